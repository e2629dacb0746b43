"""`benchmark`: a whole model, dense and sparse, eager and compiled, over sizes, dtypes and sparsities."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from sdprune.layers.dense import sharing_copy
from sdprune.layers.forms import plain_copy
from sdprune.masking.linears import matrix
from sdprune.masking.pruner import measure_sparsity
from sdprune.masking.select import select_linears
from sdprune.speed.compare import FLOORS
from sdprune.speed.plan import apply, plan
from sdprune.speed.plan_record import Plan
from sdprune.speed.timing import device_name, measure, peak_mib

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
        sparsity: fractions of random blocks to prune first, added to the model's zeros; empty: the model as it is.
        block_shape: (out, in) of the blocks, pruned and stored; None: 32 x 32 to prune, and whatever shape is the
            fastest to store.
        compile: whether torch.compile is measured too.
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
        for sparsity in self.sparsity:
            if not 0.0 < sparsity < 1.0:
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

    At each point the layers are planned for it (`sdprune.plan`) on a copy. A contender is timed only if its output is
    right: relative to the largest value of the dense float32 output, it may err twice as much as the dense model does
    in its dtype, plus a small floor. Contenders take turns. `peak_mib` is what one call holds beyond the model and its
    inputs, as torch's allocator reports it; on a CPU the copies that the compiled engine packs are not in it.

    Args:
        model: a transformers encoder or sequence classifier in float32, with zeros in its linear layers or to be
            pruned as `config.sparsity` says.
        config: what to measure.
        output: an existing folder.

    Returns:
        The rows, four a point, or two without compilation.

    Raises:
        ValueError: a length beyond the model's, a batch that it cannot take, no vocabulary, or nothing that is zero.
    """
    _check_model(model, config)
    device = torch.device(config.device)
    points = list(product(config.sparsity or (None,), config.dtype, config.batch, config.sequence))
    stages = 4 if config.compile else 3
    rows: list[Row] = []
    with tqdm(total=stages * len(points), unit="stage", dynamic_ncols=True) as bar:
        for sparsity, dtype, batch, sequence in points:
            label = f"{'' if sparsity is None else f'{sparsity:.0%} '}{dtype} {batch}x{sequence}"

            def stage(text: str, label: str = label) -> None:
                bar.set_description(f"{label}: {text}")
                bar.update()

            reference = copy.deepcopy(model).to(device)
            if sparsity is not None:
                prune_random_blocks(reference, sparsity, config.block_shape or (32, 32))
            zeros = measure_sparsity(reference, select_linears(reference, SDPruneConfig()))
            head = {"dtype": dtype, "batch": batch, "sequence": sequence, "sparsity": zeros.linear}
            head |= {"block_shape": config.block_shape and list(config.block_shape)} | _stamp(device)
            inputs = _inputs(model.config, batch, sequence, device)
            found = _point(reference, inputs, head, config, stage)
            rows += found
            with (output / ROWS_NAME).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in found))
    return rows


def _point(
    reference: nn.Module,
    inputs: Mapping[str, Tensor],
    head: Row,
    config: BenchmarkConfig,
    stage: Callable[[str], None],
) -> list[Row]:
    """The rows of one point: plan, gate, times, memory."""
    device = torch.device(config.device)
    dtype: str = head["dtype"]
    dense = reference if dtype == "float32" else copy.deepcopy(reference).to(DTYPES[dtype])
    stage("planning")
    shapes = BLOCK_SHAPES if config.block_shape is None else (config.block_shape,)
    made = plan(dense, inputs, block_shapes=shapes, repeats=config.repeats)
    sparse = apply(sharing_copy(dense), made)
    torch.compiler.reset()  # or torch.compile gives up after a few shapes
    models: dict[str, Any] = {"dense eager": dense, "sparse eager": sparse}
    if config.compile:
        stage("compiling")
        models |= {
            f"{name} compiled": torch.compile(module, dynamic=False)
            for name, module in (("dense", dense), ("sparse", sparse))
        }
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    with torch.inference_mode():
        truth = first_tensor(reference(**inputs)).double()
        allowed = FLOORS[dtype] + (0.0 if dense is reference else 2 * _error(first_tensor(dense(**inputs)), truth))
        for name, module in models.items():
            row = rows[name] = head | {"contender": name, "weights_mib": _weights_mib(dense, sparse, name)}
            if name.startswith("sparse"):
                row |= _plan_summary(made)
            call = partial(module, **inputs)
            try:
                error = _error(first_tensor(call()), truth)
            except RuntimeError as problem:  # no compiler, too little memory: the row says what was raised
                if name == "dense eager":
                    raise
                row["failed"] = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300]
                continue
            row |= {"error": error if error == error else None, "allowed": allowed, "correct": error <= allowed}
            if row["correct"]:
                calls[name] = call
        stage("timing")
        times = measure(calls, device, config.repeats)
        stage("measuring memory")
        for name, taken in times.items():
            seconds, row = taken.median / 1e3, rows[name]
            row |= {"median_ms": taken.median, "p20_ms": taken.p20, "p80_ms": taken.p80, "repeats": taken.repeats}
            row |= {"sequences_per_s": head["batch"] / seconds, "peak_mib": peak_mib(calls[name], device)}
            row["tokens_per_s"] = head["batch"] * head["sequence"] / seconds
            for mode in ("eager", "compiled"):
                base = times.get(f"dense {mode}")
                row[f"speedup_over_{mode}"] = None if base is None else base.median / taken.median
    return list(rows.values())


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
        "density": kept / max(weights, 1),
        "choices": dict(Counter(layer.choice for layer in made.layers)),
        "expected_speedup": made.expected_speedup,
        "forced_speedup": made.forced_speedup,
    }


def _weights_mib(dense: nn.Module, sparse: nn.Module, name: str) -> float:
    module = dense if name.startswith("dense") else sparse
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())) / 2**20


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
