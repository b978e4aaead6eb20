"""The DiT and FPDM networks: the iteration re-derived from the stored weights, gradients, memory, start, compilation."""

import math

import pytest
import torch
from torch.nn import functional as F

from brisk import dit, fpdm, fpdm_options

pytestmark = pytest.mark.quick
SIZES = {"sample_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_layers": 3, "num_classes": 5}
HEADS, PATCH, SIDE, OUTPUTS = 2, 2, 2, 8
PAIRS = [(0, 1), (0, 3), (2, 1), (3, 2)]


def make(dtype=torch.float64, seed=0, kind=dit.DiT, scale=0.4, **changes):
    """A network all of whose weights matter (as initialised most gates are closed)."""
    network = kind(**{**SIZES, "fixed_point": True, **changes}).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 1
            value = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.copy_(value * (scale / math.sqrt(fan) if fan > 1 else 0.1))
    return network


def inputs(dtype=torch.float64, batch=3):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 4, 4, generator=draw, dtype=torch.float64).to(dtype)
    return x, torch.tensor([3, 500, 999])[:batch], torch.tensor([0, 4, 5])[:batch]


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def normal(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_block(weights, name, x, condition):
    parts = linear(weights, f"{name}.adaLN_modulation.1", F.silu(condition))[:, None].chunk(6, dim=2)
    s1, g1, a1, s2, g2, a2 = parts
    qkv = linear(weights, f"{name}.attn.qkv", normal(x) * (1 + g1) + s1)
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    mixed = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    x = x + a1 * linear(weights, f"{name}.attn.proj", mixed.transpose(1, 2).flatten(2))
    inner = gelu(linear(weights, f"{name}.mlp.fc1", normal(x) * (1 + g2) + s2))
    return x + a2 * linear(weights, f"{name}.mlp.fc2", inner)


def plain_forward(weights, position, x, t, y, without, with_grad, blocks_know_time=False):
    """The forward pass written out: the whole of fc1 on [z ; i] in each iteration, every modulation made where it is used."""
    patches = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    u = patches @ weights["x_embedder.proj.weight"].flatten(1).T + weights["x_embedder.proj.bias"] + position
    phase = t[:, None] * 10000.0 ** -(torch.arange(128) / 128)  # in float32, which is enough
    e_t = linear(weights, "t_embedder.mlp.0", torch.cat([phase.cos(), phase.sin()], 1).to(x.dtype))
    e_t = linear(weights, "t_embedder.mlp.2", F.silu(e_t))
    e_y = weights["y_embedder.embedding_table.weight"][y]
    c = e_t + e_y
    outer = c if blocks_know_time else e_y
    u = plain_block(weights, "blocks_pre.0", u, outer)
    i = linear(weights, "block_pre_projection", u)

    def iteration(z, i):
        hidden = gelu(linear(weights, "block_fixed_point_projection_fc1", torch.cat([z, i], 2)))
        return plain_block(weights, "block_fixed_point", linear(weights, "block_fixed_point_projection_fc2", hidden), c)

    z = u.detach()
    for _ in range(without):
        z = iteration(z, i).detach()
    for _ in range(with_grad):
        z = iteration(z, i)
    z = plain_block(weights, "blocks_post.0", z, outer)
    s, g = linear(weights, "final_layer.adaLN_modulation.1", F.silu(outer))[:, None].chunk(2, dim=2)
    out = linear(weights, "final_layer.linear", normal(z) * (1 + g) + s)
    image = torch.zeros(len(x), OUTPUTS, SIDE * PATCH, SIDE * PATCH, dtype=x.dtype)
    for token in range(SIDE * SIDE):
        row, column = PATCH * (token // SIDE), PATCH * (token % SIDE)
        cut = out[:, token].reshape(-1, PATCH, PATCH, OUTPUTS).permute(0, 3, 1, 2)
        image[:, :, row : row + PATCH, column : column + PATCH] = cut
    return image


@pytest.mark.parametrize("knows_time", [False, True])
@pytest.mark.parametrize(("without", "with_grad"), PAIRS)
def test_hoisting_changes_neither_values_nor_gradients(without, with_grad, knows_time):
    network = make(pre_post_timestep_conditioning=knows_time)
    weights = {name: value.detach().clone().requires_grad_() for name, value in network.state_dict().items()}
    target = torch.linspace(-1, 1, 3 * 8 * 16, dtype=torch.float64).reshape(3, 8, 4, 4)
    found = network(*inputs(), (without, with_grad)).sample
    expected = plain_forward(weights, network.pos_embed.double(), *inputs(), without, with_grad, knows_time)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (found * target).sum().backward()
    (expected * target).sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-5, atol=1e-7, msg=name)
        assert parameter.grad.norm() > 1e-6, name


def test_iterations_without_gradient_and_with_it_apply_the_same_map():
    network = make()
    outputs = [network(*inputs(), pair).sample for pair in ((0, 4), (3, 1), (1, 3))]
    with torch.no_grad():
        outputs.append(network(*inputs(), 4).sample)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(network(*inputs(), (0, 5)).sample, outputs[0], atol=1e-4), "iterations must matter here"


@pytest.mark.parametrize("fixed_point", [True, False])
def test_recomputing_activations_changes_neither_values_nor_gradients(fixed_point):
    grads, outputs = [], []
    for recompute in (False, True):
        network = make(fixed_point=fixed_point)
        outputs.append(network(*inputs(), (1, 3), recompute=recompute).sample)
        outputs[-1].square().sum().backward()
        grads.append([parameter.grad for parameter in network.parameters()])
    assert torch.equal(*outputs)
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def saved_bytes(without, with_grad, recompute=False, fixed_point=True):
    """Bytes of the tensors that the forward pass keeps for the backward pass, parameters left out."""
    network = make(torch.float32, fixed_point=fixed_point)
    own = {parameter.data_ptr() for parameter in network.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(*inputs(torch.float32), (without, with_grad), recompute=recompute).sample
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_iterations_without_gradient_keep_nothing():
    assert saved_bytes(0, 2) == saved_bytes(1, 2) == saved_bytes(9, 2)


def test_memory_grows_by_the_same_amount_with_each_iteration_that_has_gradient():
    found = [saved_bytes(0, count) for count in (1, 2, 3, 6)]
    each = found[1] - found[0]
    assert each > 0 and found[2] - found[1] == each and found[3] - found[2] == 3 * each


def test_with_recomputation_an_iteration_keeps_its_input_alone():
    found = [saved_bytes(0, count, recompute=True) for count in (1, 2, 5)]
    state = 3 * SIDE * SIDE * 16 * 4  # bytes
    assert found[1] - found[0] == state and found[2] - found[1] == 3 * state
    assert found[2] < saved_bytes(0, 5) / 3


@pytest.mark.parametrize(("without", "with_grad"), PAIRS)
def test_pre_blocks_get_gradient_through_the_injection_alone(without, with_grad):
    network = make()
    with torch.no_grad():
        network.block_pre_projection.weight.zero_()
    network(*inputs(), (without, with_grad)).sample.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in network.named_parameters()}
    before = [name for name in grads if name.startswith(("x_embedder", "blocks_pre"))]
    assert len(before) == 12
    assert all(grads[name] is None or not grads[name].any() for name in before)
    assert all(grads[name].any() for name in grads if name not in before)


def test_without_any_gradient_iteration_the_layer_is_a_constant():
    network = make()
    network(*inputs(), (2, 0)).sample.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert grads["block_fixed_point_projection_fc1.weight"] is None and grads["x_embedder.proj.weight"] is None
    assert grads["blocks_post.0.attn.qkv.weight"].any()


def test_at_initialisation_the_shared_block_is_the_identity_and_the_output_zero():
    torch.manual_seed(0)
    network = dit.DiT(**SIZES, fixed_point=True)
    x = torch.randn(2, 4, 16)
    for block in (network.block_fixed_point, *network.blocks_pre, *network.blocks_post):
        assert torch.equal(block(x, torch.randn(2, 16)), x)
    assert not network(*inputs(torch.float32), (1, 1)).sample.any()
    assert not dit.DiT(**SIZES)(*inputs(torch.float32)).sample.any()


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    network = dit.DiT(sample_size=4, hidden_size=64, num_attention_heads=2, num_classes=300, fixed_point=True)
    for module in (network.block_pre_projection, network.block_fixed_point_projection_fc1,
                   network.block_fixed_point_projection_fc2, network.block_fixed_point.attn.qkv):  # fmt: skip
        rows, columns = module.weight.shape
        bound = math.sqrt(6 / (rows + columns))
        assert 0.9 * bound < module.weight.abs().max() <= bound and not module.bias.any()
    patch = network.x_embedder.proj.weight
    assert 0.9 * math.sqrt(6 / (64 + 16)) < patch.abs().max() <= math.sqrt(6 / (64 + 16))
    for weight in (network.y_embedder.embedding_table.weight, network.t_embedder.mlp[0].weight,
                   network.t_embedder.mlp[2].weight):  # fmt: skip
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_weights_have_the_published_names():
    block = [f"{part}.{kind}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
             for kind in ("weight", "bias")]  # fmt: skip
    shared = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    shared = [f"{name}.{kind}" for name in shared for kind in ("weight", "bias")] + ["y_embedder.embedding_table.weight"]
    layer = [f"{name}.{kind}" for kind in ("weight", "bias") for name in (
        "block_pre_projection", "block_fixed_point_projection_fc1", "block_fixed_point_projection_fc2")]  # fmt: skip
    names = [f"{place}.{name}" for name in block
             for place in ("blocks_pre.0", "blocks_pre.1", "block_fixed_point", "blocks_post.0")]  # fmt: skip
    network = dit.DiT(**SIZES, fixed_point=True, pre_depth=2)
    assert set(network.state_dict()) == {*shared, *layer, *names}
    assert {name for name, _ in network.named_buffers()} == {"pos_embed"} and network.pos_embed.shape == (1, 4, 16)
    plain = [f"blocks.{number}.{name}" for number in range(3) for name in block]
    assert set(dit.DiT(**SIZES).state_dict()) == {*shared, *plain}
    vectors = set(dit.DiT(**SIZES, label_dim=7).state_dict())
    assert vectors - {"y_embedder.weight", "y_embedder.bias"} == {*shared, *plain} - {"y_embedder.embedding_table.weight"}


def test_position_table_holds_column_then_row():
    table = dit.position_table(3, 8)[0]
    rate = [1.0, 0.01]
    for token in range(9):
        row, column = divmod(token, 3)
        expected = [f(place * r) for place in (column, row) for f in (math.sin, math.cos) for r in rate]
        assert table[token].tolist() == pytest.approx(expected, abs=1e-6)


def count_graphs(network, counts, autocast=False):
    """(graphs made of the network's iteration, outputs) for a training step with each (n, m)."""
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network.compile_iteration(backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [network(*inputs(torch.float32), pair).sample for pair in counts]
    return len(graphs), outputs


@pytest.mark.parametrize("autocast", [False, True])
def test_one_compiled_graph_serves_every_number_of_iterations(autocast):
    counts, network = [(0, 2), (0, 5), (0, 1)], make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = [make(torch.float32)(*inputs(torch.float32), pair).sample for pair in counts]
    graphs, found = count_graphs(network, counts, autocast)
    assert graphs == 1
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert set(network.state_dict()) == set(make().state_dict()), "compiling must not rename weights"


def test_a_training_step_with_any_n_and_m_compiles_one_graph_with_gradient_and_one_without():
    network = make(torch.float32)
    graphs, outputs = count_graphs(network, [(1, 1), (3, 2), (7, 1), (2, 4)])
    assert graphs == 2
    outputs[-1].square().sum().backward()
    plain = make(torch.float32)
    plain(*inputs(torch.float32), (2, 4)).sample.square().sum().backward()
    for (name, one), two in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("fixed_point", [True, False])
def test_bf16_autocast_stays_close_and_gives_finite_float32_gradients(fixed_point):
    network = make(torch.float32, fixed_point=fixed_point)
    plain = network(*inputs(torch.float32), (2, 2)).sample
    with torch.autocast("cpu", torch.bfloat16):
        output = network(*inputs(torch.float32), (2, 2))
    assert (output.sample - plain).abs().max() < 0.05 * plain.abs().max()
    output.sample.float().square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_residual_is_that_of_the_last_iteration_and_needs_no_graph():
    network = make()
    output = network(*inputs(), (2, 3))
    before = network.eval()(*inputs(), 4).state
    gap = (output.state - before).flatten(1).norm(dim=1) / output.state.flatten(1).norm(dim=1)
    torch.testing.assert_close(output.residual.double(), gap, rtol=1e-4, atol=0)
    assert not output.residual.requires_grad and output.num_iters.tolist() == [5, 5, 5]


def test_the_diffusers_class_recomputes_in_training_mode_alone_and_says_how_often_it_iterates():
    network = make(torch.float32, kind=fpdm.FPDMTransformer2DModel, num_layers=6, pre_depth=1, post_depth=2)
    assert network.default_iterations == 3
    network.enable_gradient_checkpointing()
    assert network.gradient_checkpointing
    x, t, y = inputs(torch.float32)
    calls, original = [], dit.checkpoint
    dit.checkpoint = lambda *args, **named: calls.append(args) or original(*args, **named)
    try:
        first = network.train()(x, t, y, num_iters=(1, 2)).sample
        assert len(calls) == 1 + 2 + 2, "each block and iteration with gradient"
        second = network.eval()(x, t, y, num_iters=(1, 2)).sample
        assert len(calls) == 5
    finally:
        dit.checkpoint = original
    assert torch.equal(first, second)
    assert network(x, 500, y).num_iters.tolist() == [3] * 3


def test_what_cannot_be_solved_or_trained_is_refused():
    solver = {"tolerance": 0.1}
    with pytest.raises(ValueError, match="not for a pair"):
        make()(*inputs(), (1, 1), solver=solver)
    with pytest.raises(ValueError, match="not for a plain DiT"):
        make(fixed_point=False)(*inputs(), 3, solver=solver)
    with pytest.raises(TypeError):
        make().eval()(*inputs(), 3, tolerance=0.1)
    with pytest.raises(ValueError, match=r"num_iters=\(n, m\)"):
        make()(*inputs(), 3)
    with pytest.raises(ValueError, match=r"num_iters=\(n, m\)"):
        make(torch.float32, kind=fpdm.FPDMTransformer2DModel).train()(*inputs(torch.float32))
    assert make().eval()(*inputs(), 3, solver=solver).residual.isfinite().all()
    assert make(fixed_point=False)(*inputs()).sample.requires_grad


@pytest.mark.parametrize("fixed_point", [True, False])
@pytest.mark.parametrize("mode", fpdm_options.COMPILE_MODES)
def test_outputs_of_cuda_graphs_are_taken_out_of_the_way(mode, fixed_point, monkeypatch):
    """A CUDA graph writes each output to the same place; here a function that does so stands in."""
    marks, places = [], {}

    def compiler(function, mode):
        def compiled(*given):
            found = function(*given)
            if mode in ("default", "max-autotune-no-cudagraphs"):
                return found
            return places.setdefault(function, torch.empty_like(found)).copy_(found)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    network = make(fixed_point=fixed_point).eval()
    with torch.no_grad():
        expected = network(*inputs(), 5)
        network.compile_iteration(mode)
        found = network(*inputs(), 5, solver={"solver": "anderson"} if fixed_point else None)
        plain = network(*inputs(), 5)
    assert torch.equal(plain.sample, expected.sample)
    assert len(marks) == (0 if "reduce" not in mode and mode != "max-autotune" else 10 if fixed_point else 6)
    assert found.sample.isfinite().all() and (not fixed_point or (found.residual > 0).all())
