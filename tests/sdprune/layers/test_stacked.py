"""Layers that share one product: each gets its own rows, never those of another input, thread or state."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from sdp_kernels import use_backend
from sdprune.layers.block_sparse import BlockSparseLinear
from sdprune.layers.stacked import StackedLinear, StackedPart, stack_layers, stacking_form

NAMES = ("query", "key", "value")
SIZES = (64, 32, 32)


class Attention(nn.Module):
    """Three layers of one input, as attention has them; one without a bias."""

    def __init__(self, quantized=False):
        super().__init__()
        torch.manual_seed(0)
        for name, size in zip(NAMES, SIZES, strict=True):
            linear = nn.Linear(48, size, bias=name != "key").requires_grad_(False)
            for block in range(0, size, 16):
                linear.weight[block : block + 16, 16 * (block % 3) : 16 * (block % 3) + 16] = 0
            layer = BlockSparseLinear.from_linear(linear, (16, 16))
            self.add_module(name, layer.quantize() if quantized else layer)

    def forward(self, rows):
        return torch.cat([self.query(rows), self.key(rows), self.value(rows)], -1)


@pytest.fixture(params=[False, True], ids=["float32", "int8"])
def pair(request):
    """Return the layers apart and the same ones stacked."""
    apart = Attention(request.param).eval()
    stacked = copy.deepcopy(apart)
    stack_layers(stacked, NAMES)
    return apart, stacked


@pytest.fixture
def stacked(pair):
    return pair[1]


@pytest.fixture
def products(monkeypatch):
    """Count the products that all layers together make."""
    made, forward = [], BlockSparseLinear.forward
    monkeypatch.setattr(BlockSparseLinear, "forward", lambda self, rows: made.append(rows) or forward(self, rows))
    return made


def test_one_product_gives_the_rows_of_each(pair, products):
    apart, stacked = pair
    rows = torch.randn(2, 3, 48)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            expected = apart(rows)
            products.clear()
            torch.testing.assert_close(stacked(rows), expected)
            assert len(products) == 1
            assert stacked.query.stack._slot.pending is None
    assert isinstance(stacked.key, StackedPart)
    assert (stacked.key.in_features, stacked.key.out_features) == (48, 32)
    assert torch.equal(stacked.value.bias, apart.value.bias)
    assert stacked.key.weight.dtype == apart.key.weight.dtype
    assert "in_features=48, out_features=32, 2 of 3 layers" in repr(stacked.key)
    none = torch.empty(0, 48)
    assert stacked(none).shape == (0, 128)


def test_no_layer_gets_what_belongs_to_another_call(pair, products):
    apart, stacked = pair
    first, second = torch.randn(2, 5, 48)
    with torch.no_grad():
        stacked.query(first)
        torch.testing.assert_close(stacked.key(second), apart.key(second))
        torch.testing.assert_close(stacked.value(first), apart.value(first))  # pending was dropped meanwhile
        torch.testing.assert_close(stacked.value(first), apart.value(first))  # a second time
        assert len(products) == 4 + 3
        equal = first.clone()
        torch.testing.assert_close(stacked.query(equal), apart.query(first))
        first.mul_(2)
        equal.mul_(2)
        torch.testing.assert_close(stacked.key(equal), apart.key(first))
        backwards = [stacked.get_submodule(name)(first) for name in reversed(NAMES)]
        for name, found in zip(reversed(NAMES), backwards, strict=True):
            torch.testing.assert_close(found, apart.get_submodule(name)(first))


def test_other_states_of_torch_are_other_results(stacked):
    rows = torch.randn(4, 48)
    with torch.no_grad():
        stacked.query(rows)
    assert not stacked.key(rows).requires_grad
    rows.requires_grad_()
    with torch.no_grad():
        stacked.query(rows)
    stacked.key(rows).sum().backward()
    assert rows.grad is not None
    with torch.no_grad():
        stacked.query(rows)
        with torch.autocast("cpu", torch.bfloat16):
            assert stacked.key(rows).dtype == torch.bfloat16
        with torch.inference_mode():
            assert stacked.key(rows).is_inference()


def test_other_weights_are_other_results(stacked):
    rows = torch.randn(4, 48)
    state = {
        name: torch.full_like(value, 0.1) if "bias" in name else value for name, value in stacked.state_dict().items()
    }
    with torch.no_grad():
        stacked.query(rows)
        before = stacked.key.stack._rows(stacked.key.stack.product(rows), 2)
        stacked.load_state_dict(state)
        assert not torch.equal(stacked.value(rows), before)
        rows = rows.clone()
        stacked.query(rows)
        before = stacked.key.stack._rows(stacked.key.stack.product(rows), 2)
        stacked.bfloat16().float()  # the biases, at least, are rounded by it
        assert not torch.equal(stacked.value(rows), before)


def test_what_is_pending_goes_with_its_input(stacked):
    rows = torch.randn(4, 48)
    with torch.no_grad():
        stacked.query(rows)
    pending = stacked.query.stack._slot.pending
    assert set(pending.parts) == {1, 2}
    del rows
    gc.collect()
    assert not pending.parts


def test_what_is_pending_belongs_to_its_thread(stacked, products):
    rows = torch.randn(4, 48)
    with torch.no_grad():
        stacked.query(rows)
        other = threading.Thread(target=torch.no_grad()(lambda: stacked.key(rows)))
        other.start()
        other.join()
        assert len(products) == 2
        stacked.key(rows)
        assert len(products) == 2


def test_threads_do_not_meet(pair):
    apart, stacked = pair
    shared, wrong = torch.randn(6, 48), []
    barrier = threading.Barrier(4)

    def call(number):
        torch.manual_seed(number)
        for turn in range(30):
            rows = shared if turn % 3 == 0 else torch.randn(number + 1, 48)
            barrier.wait()
            with torch.inference_mode():
                if not torch.allclose(stacked(rows), apart(rows), atol=1e-5):
                    wrong.append((number, turn))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_call_within_a_call(pair):
    apart, stacked = pair
    outer, inner = torch.randn(2, 5, 48)
    found = []

    def again(module, arguments, output):
        if arguments[0] is outer:
            found.append(stacked(inner))

    stacked.query.register_forward_hook(again)
    with torch.no_grad():
        torch.testing.assert_close(stacked(outer), apart(outer))
        torch.testing.assert_close(found[0], apart(inner))


def test_copies_have_a_stack_of_their_own(stacked):
    rows = torch.randn(4, 48)
    with torch.no_grad():
        expected = stacked(rows)
        stacked.query(rows)
        for again in (copy.deepcopy(stacked), pickle.loads(pickle.dumps(stacked))):
            assert again.query.stack is again.key.stack is again.value.stack is not stacked.query.stack
            assert torch.equal(again(rows), expected)
            stacks = [name for name, module in again.named_modules() if isinstance(module, StackedLinear)]
            assert stacks == ["query.stack"]
            assert all(name.startswith("query.stack.product.") for name in again.state_dict())
            for tensor in again.parameters():
                tensor.zero_()
            again.load_state_dict(stacked.state_dict())
            assert torch.equal(again(rows), expected)
        alone = copy.deepcopy(stacked.value)
        assert torch.equal(alone(rows), expected[:, 96:])


def test_compiled_graphs_make_the_rows_of_each_layer(pair):
    apart, stacked = pair
    torch.compiler.reset()
    compiled = torch.compile(stacked, fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens in (4, 4, 7):
            rows = torch.randn(tokens, 48)
            torch.testing.assert_close(compiled(rows), apart(rows))
    rows = torch.randn(4, 48, requires_grad=True)
    (of_stacked,) = torch.autograd.grad(compiled(rows).square().sum(), rows)
    (of_apart,) = torch.autograd.grad(apart(rows).square().sum(), rows)
    torch.testing.assert_close(of_stacked, of_apart)


class Rows(torch.utils.data.Dataset):
    """What a model makes of rows, computed in the process of a worker."""

    def __init__(self, model):
        self.model, self.rows = model, torch.randn(4, 3, 48)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(self.rows[index])


def test_forked_workers(pair):
    apart, stacked = pair
    with torch.no_grad():
        stacked.query(torch.randn(2, 48))
        data = Rows(stacked)
        found = torch.cat(list(DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="fork")))
        torch.testing.assert_close(found, apart(data.rows))


def test_the_reference_backend(pair):
    apart, stacked = pair
    rows = torch.randn(4, 48)
    with torch.no_grad(), use_backend("reference"):
        torch.testing.assert_close(stacked(rows), apart(rows))


def test_only_layers_of_one_form_are_stacked():
    layer = BlockSparseLinear.from_linear(nn.Linear(32, 32), (16, 16))
    form = stacking_form(layer)
    assert form is not None
    assert stacking_form(BlockSparseLinear.from_linear(nn.Linear(32, 64), (16, 16))) == form
    assert stacking_form(BlockSparseLinear.from_linear(nn.Linear(32, 32), (16, 32))) != form
    assert stacking_form(BlockSparseLinear.from_linear(nn.Linear(48, 32), (16, 16))) != form
    assert stacking_form(layer.quantize()) != form
    assert stacking_form(BlockSparseLinear.from_linear(nn.Linear(32, 40), (16, 16))) is None
    layer.activation = "relu"
    assert stacking_form(layer) is None
    assert stacking_form(nn.Linear(32, 32)) is None


def test_blocks_keep_their_place_in_memory():
    layers = [BlockSparseLinear.from_linear(nn.Linear(32, 32), (16, 16)) for _ in range(2)]
    expected = torch.cat([layer.values.detach() for layer in layers])
    for layer in layers:
        layer.values = nn.Parameter(layer.values.detach().transpose(1, 2).contiguous().transpose(1, 2))
    values = StackedLinear(layers).product.values
    assert torch.equal(values, expected)
    assert values.transpose(1, 2).is_contiguous()
