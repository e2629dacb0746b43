"""`benchmark`: a whole model, dense, sparse and as others run it, over sizes, dtypes and sparsities."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sdprune.config import SDPruneConfig
from sdprune.formats.form import BLOCK_SHAPES, Form
from sdprune.formats.model_config import read_config
from sdprune.formats.onnx import OnnxModel, missing_package
from sdprune.layers.dense import sharing_copy
from sdprune.layers.forms import plain_copy
from sdprune.masking.linears import matrix
from sdprune.masking.pruner import measure_sparsity
from sdprune.masking.select import select_linears
from sdprune.speed.compare import FLOORS
from sdprune.speed.opponents import (
    DENSE,
    INT8,
    LIMITS,
    OPPONENT,
    OURS,
    Contender,
    in_bfloat16,
    in_onnxruntime,
    one_line,
)
from sdprune.speed.plan import apply, plan
from sdprune.speed.plan_record import Plan
from sdprune.speed.speed_up import PRECISIONS, speed_up
from sdprune.speed.timing import Times, device_name, measure, peak_mib

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIGS: Mapping[
    str, tuple[str, dict[str, int]]
] = {  # name -> model type and what differs from the defaults of its configuration
    "bert-base": ("bert", {}),
    "bert-large": (
        "bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "distilbert-base": ("distilbert", {}),
}
ROWS_NAME = "rows.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured; every combination is one point.

    Args:
        batch: batch sizes.
        sequence: lengths in tokens.
        dtype: of the weights: "float32", "bfloat16", "float16".
        device: "cpu" or "cuda".
        sparsity: fractions of random blocks to prune first, added to the model's zeros, also 0; empty: the model as it
            is.
        block_shape: (out, in) of the blocks, pruned and stored; None: 32 x 32 to prune, and whatever shape is the
            fastest to store.
        compile: whether torch.compile is measured too.
        precision: of `sdprune.speed_up`, each a contender: "float32" (in the dtype at hand), "int8", which a GPU leaves
            out, "bfloat16".
        opponents: whether, on a CPU, the dense model in ONNX Runtime, float32 and int8, and in bfloat16 is too.
        repeats: of each timing.

    Raises:
        ValueError: a value that is not allowed; the message names the option.
    """

    batch: tuple[int, ...] = (1, 8, 32)
    sequence: tuple[int, ...] = (16, 128)
    dtype: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    sparsity: tuple[float, ...] = ()
    block_shape: tuple[int, int] | None = None
    compile: bool = True
    precision: tuple[str, ...] = ("float32", "int8")
    opponents: bool = True
    repeats: int = 7

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            values = getattr(self, name)
            if not values or not all(isinstance(value, int) and value > 0 for value in values):
                raise ValueError(f"--{name} must be whole numbers of at least 1, got {values!r}")
        for dtype in self.dtype:
            if dtype not in DTYPES:
                raise ValueError(f"--dtype must be of {', '.join(DTYPES)}, got {dtype!r}")
        if not self.dtype:
            raise ValueError(f"--dtype must be of {', '.join(DTYPES)}, got nothing")
        for precision in self.precision:
            if precision not in PRECISIONS:
                raise ValueError(f"--precision must be of {', '.join(PRECISIONS)}, got {precision!r}")
        for sparsity in self.sparsity:
            if not 0.0 <= sparsity < 1.0:
                raise ValueError(f"--sparsity must lie between 0 and 1, got {sparsity!r}")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu or cuda, got {self.device!r}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device must be cpu where torch sees no GPU, got {self.device!r}")
        if self.block_shape is not None:
            Form.blocks(self.block_shape, "--block-shape")
        if self.repeats < 3:
            raise ValueError(f"--repeats must be at least 3, got {self.repeats!r}")


def load_model(folder: str | None, config: str | None, *, trust_remote_code: bool = False) -> Any:
    """Load a model folder, or make a model with random weights from a name in `CONFIGS`, a config.json or its folder.

    Args:
        folder: of a model, or None.
        config: what to make one from, or None.
        trust_remote_code: whether code that the model brings along may run.

    Raises:
        ValueError: not exactly one of both is given, or it is no such folder, file or name.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    if (folder is None) == (config is None):
        raise ValueError("give either MODEL_DIR or --config, and not both")
    if config is not None:
        made = _configuration(config, trust_remote_code)
        trusted: Any = {"trust_remote_code": trust_remote_code}
        return AutoModel.from_config(made, **trusted).float().eval()  # type: ignore[no-untyped-call]
    path = Path(str(folder))
    if not (path / "config.json").exists() or not list(path.glob("*.safetensors")):
        raise ValueError(f"MODEL_DIR must be a folder with config.json and *.safetensors, got {str(folder)!r}")
    architectures = read_config(path, trust_remote_code=trust_remote_code).architectures or ()
    classifies = any("ForSequenceClassification" in name for name in architectures)
    kind: Any = AutoModelForSequenceClassification if classifies else AutoModel
    model = kind.from_pretrained(path, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return plain_copy(model).eval()  # the layers are planned from their zeros


def _configuration(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if name in CONFIGS:
        kind, changes = CONFIGS[name]
        return AutoConfig.for_model(kind, **changes)
    if not Path(name).exists():
        raise ValueError(f"--config must be one of {', '.join(CONFIGS)}, a config.json or its folder, got {name!r}")
    return read_config(name, trust_remote_code=trust_remote_code)


@torch.no_grad()
def prune_random_blocks(model: nn.Module, sparsity: float, block_shape: tuple[int, int], seed: int = 0) -> None:
    """Zero random blocks of the linear layers in the stack of layers, in place: the same share of every matrix."""
    generator = torch.Generator().manual_seed(seed)
    for name in select_linears(model, SDPruneConfig()):
        weight = matrix(model.get_submodule(name))
        height, width = block_shape
        rows, columns = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
        kept = torch.ones(rows * columns, dtype=torch.bool)
        kept[torch.randperm(kept.numel(), generator=generator)[: round(sparsity * kept.numel())]] = False
        mask = kept.view(rows, columns).repeat_interleave(height, 0).repeat_interleave(width, 1)
        weight.mul_(mask[: weight.shape[0], : weight.shape[1]].to(weight.device))


def benchmark(model: Any, config: BenchmarkConfig, output: Path) -> list[Row]:
    """Measure a model with zeros at every point and append its rows to `rows.jsonl` in `output` as they come.

    At each point the layers are planned for it (`sdprune.plan`) on a copy. The dense model and ours are timed only if
    their output is right: relative to the largest value of the dense float32 output, it may err twice as much as the
    dense model does in the dtype of the point, plus a small floor; in another precision, up to that one's limit.
    Opponents run the model as it was given and are judged by it; one that errs more than its limit is timed all the
    same, and its row says so. All take turns.

    `peak_mib` is what one call holds beyond the model and its inputs, as torch's allocator reports it; on a CPU the
    copies that the compiled engine packs are not in it, and ONNX Runtime reports none.

    Args:
        model: a transformers encoder or sequence classifier in float32, with zeros in its linear layers or to be
            pruned as `config.sparsity` says.
        config: what to measure.
        output: an existing folder.

    Returns:
        The rows, one a contender at each point.

    Raises:
        ValueError: a length beyond the model's, a batch that it cannot take, no vocabulary, or nothing that is zero.
    """
    _check_model(model, config)
    device = torch.device(config.device)
    opposed = config.opponents and device.type == "cpu"
    sparsities = config.sparsity or (None,)
    points = list(product(config.dtype, config.batch, config.sequence))
    rows: list[Row] = []
    quick = sum(precision != "int8" or device.type == "cpu" for precision in config.precision)
    total = opposed + len(sparsities) * (3 + config.compile + quick) * len(points)
    given = copy.deepcopy(model).to(device)
    with tqdm(total=total, unit="stage", dynamic_ncols=True) as bar:

        def stage(label: str, text: str) -> None:
            bar.set_description(f"{label}: {text}")
            bar.update()

        opponents: list[Contender] = []
        if opposed:
            stage("opponents", "exporting to ONNX")
            opponents = _opponents(given)
        for sparsity in sparsities:
            reference = copy.deepcopy(given)
            if sparsity is not None:
                prune_random_blocks(reference, sparsity, config.block_shape or (32, 32))
            zeros = measure_sparsity(reference, select_linears(reference, SDPruneConfig()))
            head = {"sparsity": zeros.linear, "block_shape": config.block_shape and list(config.block_shape)}
            for dtype, batch, sequence in points:
                where = {"dtype": dtype, "batch": batch, "sequence": sequence} | head | _stamp(device)
                label = f"{'' if sparsity is None else f'{sparsity:.0%} '}{dtype} {batch}x{sequence}"
                found = _point(reference, given, opponents, where, config, partial(stage, label))
                _append(output / ROWS_NAME, found)
                rows += found
    return rows


def _opponents(given: Any) -> list[Contender]:
    return [in_bfloat16(given), *in_onnxruntime(given, _inputs(given.config, 2, 3, torch.device("cpu")))]


def _append(path: Path, rows: Sequence[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _point(
    reference: Any,
    given: Any,
    opponents: Sequence[Contender],
    head: Row,
    config: BenchmarkConfig,
    stage: Callable[[str], None],
) -> list[Row]:
    """The rows of one point: plan, gate, times, memory."""
    device = torch.device(config.device)
    inputs = _inputs(reference.config, head["batch"], head["sequence"], device)
    contenders = [*_contenders(reference, inputs, head["dtype"], config, stage), *opponents]
    contenders = [one for one in contenders if one.name != f"dense {head['dtype']}"]  # where that is the dense model
    with torch.inference_mode():
        judges = {DENSE: reference, OURS: reference, OPPONENT: given}
        truths = {role: first_tensor(model(**inputs)).double() for role, model in judges.items()}
        rows, calls = _gate(contenders, truths, inputs, head)
        stage("timing")
        times = measure(calls, device, config.repeats)
        stage("measuring memory")
        for name, taken in times.items():
            rows[name] |= _speed(taken, times, head)
            if not isinstance(calls[name].func, OnnxModel):
                rows[name]["peak_mib"] = peak_mib(calls[name], device)
    return list(rows.values())


def _contenders(
    reference: nn.Module,
    inputs: Mapping[str, Tensor],
    dtype: str,
    config: BenchmarkConfig,
    stage: Callable[[str], None],
) -> list[Contender]:
    """The dense model, first of all, and ours at one point."""
    dense = reference if dtype == "float32" else copy.deepcopy(reference).to(DTYPES[dtype])
    stage("planning")
    shapes = BLOCK_SHAPES if config.block_shape is None else (config.block_shape,)
    made = plan(dense, inputs, block_shapes=shapes, repeats=config.repeats)
    found = [
        Contender("dense eager", DENSE, dtype, dense),
        Contender("sparse eager", OURS, dtype, apply(sharing_copy(dense), made), _plan_summary(made)),
    ]
    if config.compile:
        stage("compiling")
        torch.compiler.reset()  # or torch.compile gives up after a few shapes
        found += [
            replace(one, name=one.name.replace("eager", "compiled"), model=torch.compile(one.model, dynamic=False))
            for one in found
        ]
    for precision in config.precision:
        if precision == "int8" and inputs["input_ids"].is_cuda:
            continue
        stage(f"speeding up in {precision}")
        found.append(_sped_up(dense, inputs, dtype if precision == "float32" else precision))
    return found


def _sped_up(dense: nn.Module, inputs: Mapping[str, Tensor], precision: str) -> Contender:
    """What `speed_up` makes of the dense model; one that would differ too much is told, not timed."""
    name, rounded = f"speed_up {precision}", precision if precision in ("int8", "bfloat16") else "float32"
    try:
        made: Any = speed_up(dense, inputs, precision=rounded)  # type: ignore[arg-type]
    except RuntimeError as problem:
        return Contender(name, OURS, precision, None, {}, one_line(problem))
    plan_of_it = made.sped_up.plan
    return Contender(name, OURS, precision, made, {} if plan_of_it is None else _plan_summary(plan_of_it))


def _gate(
    contenders: Sequence[Contender], truths: Mapping[str, Tensor], inputs: Mapping[str, Tensor], head: Row
) -> tuple[dict[str, Row], dict[str, Any]]:
    """A row for each contender, with its error from the truth of its role, and the calls that are to be timed."""
    rows: dict[str, Row] = {}
    calls: dict[str, Any] = {}
    dtype: str = head["dtype"]
    lost = _error(first_tensor(contenders[0].model(**inputs)), truths[DENSE])  # by the dense model in its dtype
    for one in contenders:
        row = rows[one.name] = head | {"contender": one.name, "role": one.role, "precision": one.precision}
        row |= {"weights_mib": one.weights_mib, **one.facts}
        if one.failed:
            row["failed"] = one.failed
            continue
        call = partial(one.model, **inputs)
        try:
            error = _error(first_tensor(call()), truths[one.role])
        except Exception as problem:  # no compiler, too little memory: the row says what was raised
            if one.role != OPPONENT and not isinstance(problem, RuntimeError):
                raise
            row["failed"] = one_line(problem)
            continue
        allowed = FLOORS[dtype] + 2 * lost if one.precision == dtype else LIMITS[one.precision]
        row |= {"error": error if error == error else None, "allowed": allowed, "correct": error <= allowed}
        if row["correct"] or one.role == OPPONENT:
            calls[one.name] = call
    return rows, calls


def _speed(taken: Times, times: Mapping[str, Times], head: Row) -> Row:
    """What a row says of times, and how they compare with those of the dense model and of the hardest opponent."""
    seconds = taken.median / 1e3
    found: Row = {"median_ms": taken.median, "p20_ms": taken.p20, "p80_ms": taken.p80, "repeats": taken.repeats}
    found |= {"sequences_per_s": head["batch"] / seconds, "tokens_per_s": head["batch"] * head["sequence"] / seconds}
    for key, name in (("eager", "dense eager"), ("compiled", "dense compiled"), ("int8", INT8)):
        found[f"speedup_over_{key}"] = times[name].median / taken.median if name in times else None
    return found


def first_tensor(output: Any) -> Tensor:
    """The logits of a classifier, the last hidden state of an encoder."""
    found = output[0] if not hasattr(output, "logits") else output.logits
    assert isinstance(found, Tensor)
    return found


def _error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


def _plan_summary(made: Plan) -> Row:
    weights = sum(layer.shape[0] * layer.shape[1] for layer in made.layers)
    kept = sum(layer.density * layer.shape[0] * layer.shape[1] for layer in made.layers)
    return {
        "density": kept / weights if weights else 1.0,
        "choices": dict(Counter(layer.choice for layer in made.layers)),
        "expected_speedup": made.expected_speedup,
        "forced_speedup": made.forced_speedup,
    }


def _inputs(config: Any, batch: int, sequence: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else -1
    ids = torch.randint(1, config.vocab_size, (batch, sequence), generator=generator)
    ids[ids == pad] = 1 if pad != 1 else 2  # padding in the middle would change the length
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def _stamp(device: torch.device) -> Row:
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "onnxruntime": version("onnxruntime") if missing_package() is None else None,
        "sdprune": version("sdprune"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _check_model(model: Any, config: BenchmarkConfig) -> None:
    if not isinstance(getattr(model.config, "vocab_size", None), int):
        raise ValueError(f"MODEL_DIR must be a text model, {type(model).__name__} has no vocab_size")
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int):
        for name, module in model.named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                limit -= module.padding_idx + 1  # RoBERTa counts positions from there
                break
        if max(config.sequence) > limit:
            raise ValueError(
                f"--sequence must be at most {limit}, the positions of this model, got {max(config.sequence)}"
            )
    needs_pad = "ForSequenceClassification" in type(model).__name__ and getattr(model.config, "pad_token_id", 0) is None
    if needs_pad and max(config.batch) > 1:
        raise ValueError(f"--batch must be 1: this model has no padding token, got {max(config.batch)}")
    zeros = measure_sparsity(model, select_linears(model, SDPruneConfig()))
    if not config.sparsity and zeros.zeros == 0:
        raise ValueError("--sparsity is missing: the linear layers of this model have no zeros to skip")


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use this many threads of the CPU inside the block; None: as many as before.

    Raises:
        ValueError: less than one.
    """
    if count is not None and count < 1:
        raise ValueError(f"--threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
