"""The house as a whole: no circles, one order, short functions, everything public documented, little said twice."""

import pytest

from tests.house import House, circle, folder, repeated

HOUSES = {name: House(name) for name in ("sdp_kernels", "sdprune", "bench")}
PACKAGES = [HOUSES[name] for name in ("sdp_kernels", "sdprune")]


@pytest.mark.parametrize("house", HOUSES.values(), ids=HOUSES)
def test_no_imports_go_in_a_circle(house: House) -> None:
    assert not circle(house.graph)
    assert not circle(house.folders)


def test_circles_and_imports_are_seen() -> None:
    house = HOUSES["sdprune"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert "sdprune.runs.demo" in house.graph["sdprune.commands.demo"], "inside of a function"
    assert "sdprune.runs.prune" in house.graph["sdprune"], "for type checkers"
    assert {"sdprune.runs", "sdprune.recipe"} <= house.folders["sdprune.commands"]
    assert all(module in house.files for found in house.graph.values() for module in found)


def test_what_lies_on_disk_knows_no_layer_and_no_layer_knows_a_stopwatch() -> None:
    """Formats, then layers, then speed, then exports: a checkpoint is read without anything that times."""
    order = ["sdprune.formats", "sdprune.layers", "sdprune.speed", "sdprune.exports", "sdprune.runs"]
    graph = HOUSES["sdprune"].folders
    for place, own in enumerate(order):
        assert not graph[own] & set(order[place + 1 :])
    assert "sdprune.speed" not in {folder(name) for name in reachable("sdprune.exports.load")}


def reachable(start: str) -> set[str]:
    """All modules that one needs, directly or through others."""
    graph, found, waiting = HOUSES["sdprune"].graph, set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def test_functions_are_short() -> None:
    lengths = sorted(node.end_lineno - node.lineno + 1 for house in PACKAGES for node in house.functions)
    assert lengths[int(0.9 * len(lengths))] <= 28


def test_files_are_short() -> None:
    lengths = [len(path.read_text().splitlines()) for house in PACKAGES for path in house.files.values()]
    assert sum(lengths) / len(lengths) <= 137
    assert max(lengths) <= 450


def test_what_is_public_is_documented() -> None:
    names = [found for house in PACKAGES for found in house.undocumented]
    assert len(names) > 600
    assert sum(missing for _, missing in names) <= 0.04 * len(names), [name for name, missing in names if missing]


def test_little_is_said_twice() -> None:
    assert repeated({"a": list("abcdef"), "b": list("xabcdefy"), "c": list("abcde")}) == 12 / 19
    lines = {name: text for house in HOUSES.values() for name, text in house.lines.items()}
    assert repeated(lines) <= 0.03
