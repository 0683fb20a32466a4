"""Steps that fill `.grad`: they equal PyTorch's own, compile once, and refuse what they must."""

import copy
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from needs_torch import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import prograde as pg
import prograde.torch

LOW_RANK = pg.WeightPerturbation(pg.LowRank(rank=1))


class Net(nn.Module):
    """Batch norms of both kinds, a frozen layer, an unused one, and dropout."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.first = nn.Linear(6, 5, bias=False)  # a norm takes out what follows from a bias
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.norm, self.average = nn.BatchNorm1d(5), nn.BatchNorm1d(5, momentum=None)
        self.unused, self.last = nn.Linear(2, 2), nn.Linear(5, 1)
        self.dropout = nn.Dropout(rate)

    def forward(self, x):
        x = self.average(torch.tanh(self.norm(self.frozen(self.first(x)))))
        return self.last(self.dropout(x))


def loss_fn(module, x, y):
    return (module(x) - y).square().mean()


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(8, 6), torch.randn(8, 1)


def grads(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, rtol=1e-4, atol=1e-6):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_ten_steps_equal_those_of_torch(optimizer, batch):
    """With exact gradients: parameters, buffers, and what has no gradient."""
    theirs, ours = Net(), Net()
    ours.load_state_dict(theirs.state_dict())
    frozen = ours.frozen.weight.clone()
    a, b = (optimizer(m.parameters(), lr=0.01, weight_decay=0.1) for m in (theirs, ours))
    step = pg.torch.value_and_grad(ours, loss_fn, pg.Backprop())
    for _ in range(10):
        a.zero_grad()
        want = loss_fn(theirs, *batch)
        want.backward()
        a.step()
        b.zero_grad()
        loss = step(*batch)
        assert_same(grads(ours), grads(theirs), atol=2e-5)
        b.step()
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=0)
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.frozen.weight, frozen)
    assert ours.unused.weight.grad is None


def test_gradients_accumulate(batch):
    module = Net()
    step = pg.torch.value_and_grad(module, loss_fn, pg.Backprop())
    step(*batch)
    once = grads(module)
    step(*batch)
    assert_same(grads(module), {name: 2 * g for name, g in once.items()})


def test_masks_differ_from_step_to_step_and_tangents_share_one(batch):
    ours, others = Net(0.5), Net(0.5)
    others.load_state_dict(ours.state_dict())
    exact = pg.torch.value_and_grad(ours, loss_fn, pg.Backprop(), seed=3)
    forward = pg.torch.value_and_grad(others, loss_fn, pg.ForwardJacobian(), seed=3)
    losses = []
    for _ in range(3):
        losses.append(exact(*batch).item())
        assert forward(*batch).item() == pytest.approx(losses[-1], rel=1e-5)
        assert_same(grads(others), grads(ours), atol=1e-5)
    assert len(set(losses)) == 3
    exact.calls = 1
    assert exact(*batch).item() == losses[1]


def test_nothing_is_compiled_again_and_modes_are_told_apart(batch):
    module = Net()
    traces = []

    def counted(module, x, y):
        traces.append(module.training)
        return loss_fn(module, x, y)

    step = pg.torch.value_and_grad(module, counted, LOW_RANK)
    first = step(*batch)
    count = len(traces)
    mean = module.norm.running_mean.clone()
    module.eval()
    assert step(*batch) != first
    assert torch.equal(module.norm.running_mean, mean)
    assert traces[count:]
    assert not any(traces[count:])
    count = len(traces)
    step(*batch)
    module.train()
    step(*batch)
    assert len(traces) == count
    assert [run._cache_size() for run in step._compiled.values()] == [1, 1]


def test_unfreezing_and_numbers_among_the_attributes_are_seen(batch):
    module = Net()
    step = pg.torch.value_and_grad(module, loss_fn, pg.Backprop())
    step(*batch)
    assert module.frozen.weight.grad is None
    module.frozen.requires_grad_(True)
    before = step(*batch)
    assert module.frozen.weight.grad is not None
    module.norm.eps = 1.0
    assert step(*batch) != before


def test_train_step_equals_value_and_grad_with_an_optimizer(batch):
    ours, others = Net(0.5), Net(0.5)
    others.load_state_dict(ours.state_dict())
    estimator = pg.WeightPerturbation(pg.LowRank(rank=1), num_tangents=2)
    step = pg.torch.value_and_grad(ours, loss_fn, estimator, seed=1)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    whole = pg.torch.TrainStep(others, loss_fn, estimator, optax.sgd(0.01), seed=1)
    start = others.first.weight.clone()
    for _ in range(4):
        optimizer.zero_grad()
        loss = step(*batch)
        optimizer.step()
        np.testing.assert_allclose(loss.item(), whole(*batch), rtol=1e-5)
    assert torch.equal(others.first.weight, start)
    whole.to_module()
    assert_same(others.state_dict(), ours.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_train_step_sees_modes_and_keeps_what_the_loss_leaves_out(batch):
    module, (x, y) = Net(), batch
    step = pg.torch.TrainStep(module, loss_fn, LOW_RANK, optax.adamw(0.01, weight_decay=1.0))
    x = x.clone()
    for _ in range(3):
        loss = step(x, y)
        x.mul_(-1)  # a loader that fills the same memory again
    unused = module.unused.weight.clone()
    module.eval()
    assert step(x, y) != loss  # compared with PyTorch at the parameters of the step
    step.to_module()
    assert torch.equal(module.unused.weight, unused)
    module.train()
    step._programs.compare = False
    skipping = lambda module, x, y: module.last.weight.sum() * x.mean()
    step._programs.traceable.loss_fn = skipping
    with pytest.raises(ValueError, match=r"in one step and not in another: .*first\.weight"):
        step(x[:4], y)


def test_factored_tangents_pass_the_layers_of_a_module(batch):
    module = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 1))
    params, buffers, f = pg.torch.functionalize(module, loss_fn)
    of_loss = lambda *args: f(*args)[0]
    report = pg.check(of_loss, params, buffers, None, *map(jnp.asarray, batch), estimator=LOW_RANK)
    assert not report.dense
    assert report.ok


def test_an_estimator_that_learns_keeps_its_state(batch):
    module = Net()
    step = pg.torch.value_and_grad(module, loss_fn, pg.Guided("momentum"))
    step(*batch)
    kept = jax.tree.map(np.array, step.state)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.step()
    nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(step.state), strict=True):
        np.testing.assert_array_equal(a, b)
    step(*batch)


def test_losses_by_example_and_auxiliary_output(batch):
    def loss(module, batch):
        out = module(batch["x"])
        return (out - batch["y"]).square().mean(1), {"out": out, "name": "last"}

    module = Net().eval()
    step = pg.torch.value_and_grad(module, loss, pg.ForwardJacobian(), has_aux=True)
    value, aux = step(dict(zip("xy", batch, strict=True)))
    torch.testing.assert_close(value, loss_fn(module, *batch).detach())
    torch.testing.assert_close(aux["out"], module(batch[0]).detach())
    assert aux["name"] == "last"
    assert not aux["out"].requires_grad


def test_float64_stays_float64(batch):
    module, batch = Net().double(), [x.double() for x in batch]
    with jax.enable_x64(True):
        step = pg.torch.value_and_grad(module, loss_fn, pg.ForwardJacobian())
        step(*batch)
    ours = grads(module)
    module.zero_grad()
    loss_fn(module, *batch).backward()
    assert_same(ours, grads(module), rtol=1e-9, atol=1e-12)


def test_bfloat16(batch):
    module = nn.Linear(6, 1).bfloat16()
    x, y = (x.bfloat16() for x in batch)
    step = pg.torch.value_and_grad(module, loss_fn, LOW_RANK)
    step(x, y)
    assert module.weight.grad.dtype == torch.bfloat16


def masked(module, x):
    out = module(x)
    return out[out > 0].mean()


def branching(module, x):
    out = module(x).mean()
    return out if out > 0 else -out


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


def penalty(module, x):
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(module(x).sum(), x)
    return slope.square().mean()


def autocast(module, x):
    with torch.autocast("cpu"):
        return module(x).float().mean()


def overwriting(module, x):
    with torch.no_grad():
        module[0].weight.clamp_(-1, 1)
    return module(x).mean()


OUTSIDE = nn.Linear(6, 1)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (masked, "selects by a boolean mask at .*test_steps.py:.*masked.*torch.where"),
        (branching, "branches on the value of a tensor at .*test_steps.py.*torch.where"),
        (lambda m, x: m(x).mean() * x.sum().item(), "into a Python number at .*test_steps.py"),
        (lambda m, x: m(x).mean() * len(x.nonzero()), "where a tensor is not zero at .*test_steps"),
        (lambda m, x: m(x).mean() * x.unique().sum(), "unique values of a tensor at .*test_steps"),
        (lambda m, x: Sign.apply(m(x)).mean(), "Sign at .*test_steps.*functions='inline'"),
        (penalty, "autograd.* at .*test_steps.py.*functionalize"),
        (lambda m, x: m(x).mean().backward(), "calls backward at .*test_steps.py"),
        (autocast, "autocast at .*test_steps.py.*bfloat16"),
        (overwriting, "parameter '0.weight' in place"),
        (lambda m, x: m(x).mean() + OUTSIDE(x).mean(), "requires grad and is no parameter"),
        (lambda m, x: OUTSIDE(x).mean(), "requires grad and is no parameter"),
        (lambda m, x: m(x), r"shape \(8, 1\), but a scalar or one loss for each example"),
        (lambda m, x: (m(x) > 0).sum(), "dtype torch.int.*, but a real float"),
        (lambda m, x: {"loss": m(x).mean()}, "returned dict, but a tensor"),
        (lambda m, x: torch.zeros(()), "does not depend on any trainable parameter"),
        (lambda m, x: m(x).detach().mean(), "detached tensors alone"),
        (lambda m, x: m(x.double()).mean(), "float64"),
        (lambda m, x: m(x).mean() * torch.rand((), generator=torch.Generator()), "Generator"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_a_remedy(loss, words, batch):
    step = pg.torch.value_and_grad(nn.Sequential(nn.Linear(6, 1)), loss, LOW_RANK)
    with pytest.raises((TypeError, ValueError), match=f"(?s){words}"):
        step(batch[0])


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class NewSquare(Square):
    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


@pytest.mark.parametrize("function", [Square, NewSquare])
def test_a_function_is_inlined_on_request(function, batch):
    module = nn.Linear(6, 1)
    loss = lambda m, x: function.apply(m(x)).mean()
    step = pg.torch.value_and_grad(module, loss, pg.ForwardJacobian(), functions="inline")
    step(batch[0])
    ours = grads(module)
    module.zero_grad()
    loss(module, batch[0]).backward()  # PyTorch's own apply is back
    assert_same(ours, grads(module))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_torch_pass(reentrant, batch):
    module = nn.Linear(6, 1)
    loss = lambda m, x: checkpoint(m, x, use_reentrant=reentrant).square().mean()
    x = batch[0].requires_grad_()
    step = pg.torch.value_and_grad(module, loss, pg.ForwardJacobian())
    step(x)
    ours = grads(module)
    module.zero_grad()
    loss(module, x).backward()
    assert_same(ours, grads(module))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: nn.Linear(6, 1).requires_grad_(False), "no parameter with requires_grad=True"),
        (nn.ReLU, "no parameter with requires_grad=True"),
        (lambda: nn.LazyLinear(1), "has no shape yet"),
        (lambda: nn.Linear(6, 1, device="meta"), r"device 'meta'.*module\.to"),
        (lambda: nn.Linear(6, 1).half(), r"float16 on the CPU.*module\.float\(\)"),
        (lambda: nn.Linear(6, 1).double(), r"float64.*jax_enable_x64.*module\.float\(\)"),
        (lambda: nn.Linear(6, 1).to(torch.complex64), "real floating-point"),
        (lambda: "linear", "torch.nn.Module is needed"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Complex modules")
def test_modules_that_cannot_be_trained_are_refused(made, words, batch):
    with pytest.raises((TypeError, ValueError), match=words):
        pg.torch.value_and_grad(made(), loss_fn, LOW_RANK)(*batch)


def test_backward_hooks_are_refused(batch):
    module = nn.Linear(6, 1)
    step = pg.torch.value_and_grad(module, loss_fn, LOW_RANK)
    handle = module.register_full_backward_hook(lambda *args: None)
    with pytest.raises(TypeError, match="hooks of the backward pass"):
        step(*batch)
    handle.remove()
    module.weight.register_hook(lambda g: 2 * g)
    with pytest.raises(TypeError, match="'weight' has hooks"):
        step(*batch)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.ones((8, 6)), TypeError, "numpy.ndarray, but a torch.Tensor"),
        (torch.ones(8, 6, dtype=torch.float64), ValueError, "tensor 0 of the batch.*float64"),
        (torch.tensor([2**40]), ValueError, "beyond 32 bits"),
        ({1, 2}, TypeError, "leaf 0 of the batch is set"),
        (torch.ones(8, 6).to_sparse(), ValueError, "sparse"),
    ],
)
def test_bad_batches_are_named(x, error, words, batch):
    step = pg.torch.value_and_grad(nn.Linear(6, 1), loss_fn, LOW_RANK)
    with pytest.raises(error, match=words):
        step(x, batch[1])


def test_a_parameter_of_another_shape_is_refused(batch):
    module = Net()
    step = pg.torch.value_and_grad(module, loss_fn, LOW_RANK)
    step(*batch)
    module.last.weight = nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"'last.weight' has shape \(2, 5\), but had .*\(1, 5\)"):
        step(*batch)


def test_a_constant_that_changed_is_refused(batch):
    scale = torch.ones(())
    loss = lambda m, x, y: loss_fn(m, x, y) * scale
    step = pg.torch.value_and_grad(nn.Linear(6, 1), loss, LOW_RANK)
    step(*batch)
    scale.mul_(2)
    with pytest.raises(ValueError, match="changed since the loss was traced"):
        step(*batch)


def test_a_counter_of_python_is_named_once(batch):
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            self.last = x
            return super().forward(x)

    module = Counting(6, 1)
    step = pg.torch.value_and_grad(module, loss_fn, LOW_RANK)
    with pytest.warns(RuntimeWarning, match="attribute 'calls'"):
        step(*batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*batch)
    module(batch[0])  # no traced tensor was left behind


def test_a_derivative_that_is_not_finite_is_named(batch):
    loss = lambda m, x, y: (0 * m(x)).sum().sqrt()
    step = pg.torch.value_and_grad(nn.Linear(6, 1), loss, LOW_RANK)
    with pytest.warns(RuntimeWarning, match="call 1, and its derivative"):
        step(*batch)


def test_a_second_thread_is_refused(batch):
    inside, leave = threading.Event(), threading.Event()

    def waiting(module, x, y):
        inside.set()
        leave.wait(60)
        return loss_fn(module, x, y)

    step = pg.torch.value_and_grad(nn.Linear(6, 1), waiting, LOW_RANK)
    thread = threading.Thread(target=step, args=batch)
    thread.start()
    assert inside.wait(60)
    with pytest.raises(RuntimeError, match="another thread"):
        step(*batch)
    leave.set()
    thread.join()
    step(*batch)


def test_an_operation_with_another_meaning_in_jax_is_found(batch):
    from prograde.torch._environment import environment

    kept = environment._ops[torch.ops.aten.tanh]
    environment.override_op_definition(torch.ops.aten.tanh, lambda x: x.sin())
    try:
        step = pg.torch.value_and_grad(Net(0.5), loss_fn, LOW_RANK)
        with pytest.raises(ValueError, match=r"the loss is .* in JAX, but .* in PyTorch"):
            step(*batch)
    finally:
        environment._ops[torch.ops.aten.tanh] = kept


def test_dropout_is_left_out_of_the_comparison(batch):
    """In modules, functions, attention and recurrent layers."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)
            self.lstm = nn.LSTM(6, 3, num_layers=2, dropout=0.3, batch_first=True)

        def forward(self, x):
            x = x[None] + self.attention(x[None], x[None], x[None])[0]
            x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.3)
            return F.dropout(self.lstm(F.dropout1d(x, 0.3, self.training))[0], 0.3)[0, :, :1]

    rng = torch.get_rng_state()
    step = pg.torch.value_and_grad(Model(), loss_fn, LOW_RANK)
    rng = torch.get_rng_state()
    losses = {step(*batch).item() for _ in range(3)}
    assert torch.equal(torch.get_rng_state(), rng)
    assert len(losses) == 3
    assert list(step._programs.compared.values()) == [True]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(estimator=pg.WeightPerturbation), TypeError, "instance of an estimator"),
        (dict(loss_fn=3), TypeError, "loss_fn=3"),
        (dict(functions="keep"), ValueError, "functions='keep'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    given = dict(module=nn.Linear(6, 1), loss_fn=loss_fn, estimator=LOW_RANK) | arguments
    with pytest.raises(error, match=words):
        pg.torch.value_and_grad(**given)
    if "estimator" not in arguments:
        return
    with pytest.raises(TypeError, match="transformation of Optax"):
        pg.torch.TrainStep(nn.Linear(6, 1), loss_fn, LOW_RANK, torch.optim.SGD)


def test_a_module_can_be_copied_and_saved_after_steps(batch):
    module = Net()
    step = pg.torch.value_and_grad(module, loss_fn, LOW_RANK)
    step(*batch)
    copy.deepcopy(module)(batch[0])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_works_afterwards(batch):
    module = nn.Linear(6, 1)
    pg.torch.value_and_grad(module, loss_fn, LOW_RANK)(*batch)
    torch.testing.assert_close(torch.compile(module)(batch[0]), module(batch[0]))
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.accelerator.is_available()
