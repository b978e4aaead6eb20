"""The reader of published pickles: networks come out exactly, crafted files are refused, nothing of a file ever runs."""

import collections
import io
import os
import pickle
import pickletools
import struct

import numpy as np
import pickles
import pytest
import torch
from pickles import Evil, Persistent
from torch import nn

from brisk import edm_nets, safe_pickle
from brisk.options import UserError

pytestmark = pytest.mark.quick
TINY = {"img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "model_channels": 8,
        "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1, "augment_dim": 9}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """Every crafted file here would leave a file `pwned`."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "pwned").exists()


def refused(path, reader=safe_pickle.read):
    with pytest.raises(UserError) as caught:
        reader(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)) and message.endswith(".")
    return message


def edm_pickle(path, config, protocol=4, **more):
    """(path, network): a pickle like EDM's of a network of random weights, its buffers of an encoder shared."""
    network = edm_nets.make_network(config)
    network._init_args, network._init_kwargs = (), dict(config)
    network.model.skip_scale = np.sqrt(0.5)
    return pickles.dump({"ema": network, **more}, path, protocol), network


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("changes", [{}, {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1], "augment_dim": 0}, {"model_type": "DhariwalUNet", "label_dim": 5, "model_channels": 64}],
    ids=["ddpmpp", "ncsnpp", "adm"])  # fmt: skip
def test_edm_network_comes_back_bit_for_bit(tmp_path, changes, protocol):
    config = TINY | changes | {"use_fp16": True, "sigma_data": np.float64(0.5)}
    path, network = edm_pickle(tmp_path / "net.pkl", config, protocol, augment_pipe=Persistent("AugmentPipe", {"p": 0.1}))
    found = safe_pickle.read_network(path)
    assert found.config == config and type(found.config["sigma_data"]) is float
    wanted = network.state_dict()
    assert found.weights.keys() == wanted.keys() and len(wanted) > 100
    assert all(torch.equal(found.weights[name], wanted[name]) for name in wanted)
    assert all(found.weights[name].dtype == wanted[name].dtype for name in wanted)
    again = edm_nets.make_network(found.config)
    again.load_state_dict(found.weights)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 20.0])
    with torch.no_grad():
        assert torch.equal(again(x, sigma), network(x, sigma))


def test_dtypes_views_and_ties_are_kept(tmp_path):
    layer = nn.Module()
    base = torch.arange(24.0)
    layer.register_buffer("halves", torch.randn(3).half())
    layer.register_buffer("brain", torch.randn(3).bfloat16())
    layer.register_buffer("count", torch.tensor(7))
    layer.register_buffer("view", base[3:21].view(3, 6).T[1:5])
    layer.register_buffer("whole", base)
    layer.register_buffer("empty", torch.zeros(0, 3))
    layer.register_buffer("absent", None)
    layer.register_buffer("passing", torch.ones(1), persistent=False)
    layer.inner = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False)})
    layer._init_kwargs = {}
    for protocol in (3, 4):
        content = safe_pickle.read(pickles.dump(layer, tmp_path / "layer.pkl", protocol))
        found, wanted = safe_pickle.state_dict(content), layer.state_dict()
        assert found.keys() == wanted.keys() and "passing" not in found
        assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)


def test_layers_of_older_torch_keep_their_tensors_in_ordered_dicts(tmp_path):
    inner = Persistent("Inner", {"_parameters": collections.OrderedDict(weight=nn.Parameter(torch.ones(2)), bias=None)})
    whole = Persistent("Net", {"_buffers": collections.OrderedDict(a=torch.zeros(1)), "_modules": collections.OrderedDict(b=inner)})
    found = safe_pickle.state_dict(safe_pickle.read(pickles.dump(whole, tmp_path / "old.pkl")))
    assert {name: value.tolist() for name, value in found.items()} == {"a": [0.0], "b.weight": [1.0, 1.0]}


def test_what_a_pickle_says_of_a_class_is_kept_and_its_source_is_not(tmp_path):
    path = pickles.dump(Persistent("Thing", {"a": 1}), tmp_path / "thing.pkl")
    found = safe_pickle.persistent(safe_pickle.read(path))
    assert (found.class_name, found.version, found.state) == ("Thing", 6, {"a": 1})
    assert len(found.source_sha256) == 64 and "pwned" not in str(found)
    assert safe_pickle.persistent({"a": 1}) is None


def test_plain_values(tmp_path):
    content = {"a": [1, 2.5, None, True, "x"], "b": collections.OrderedDict(c=(1, 2)), "d": np.float64(0.1), "e": np.float32(0.5),
               "f": np.int64(-3), "g": np.bool_(True), "t": torch.tensor([1.0, 2.0])}  # fmt: skip
    path = pickles.dump(content, tmp_path / "plain.pkl")
    expected = {"a": [1, 2.5, None, True, "x"], "b": {"c": [1, 2]}, "d": 0.1, "e": 0.5, "f": -3, "g": True,
                "t": [1.0, 2.0]}
    assert safe_pickle.plain(safe_pickle.read(path)) == expected
    big = {"value": np.dtype(">f8").type(0.25)}
    assert safe_pickle.plain(safe_pickle.read(pickles.dump(big, path))) == {"value": 0.25}
    for wrong in ({"a": np.complex64(1)}, {"a": np.str_("x")}, {1: 2}, {"a": {1, 2}}, {"a": b"bytes"}, [nn.Sigmoid()]):
        with pytest.raises(ValueError):
            safe_pickle.plain(safe_pickle.read(pickles.dump(wrong, path)))


EVIL = {
    "builtins.eval": Evil(eval, "open('pwned', 'w')"),
    "builtins.exec": Evil(exec, "open('pwned', 'w')"),
    "io.open": Evil(open, "pwned", "w"),
    "builtins.getattr": Evil(getattr, "text", "upper"),
    "builtins.__import__": Evil(__import__, "os"),
    f"{os.system.__module__}.system": Evil(os.system, "touch pwned"),
    "subprocess.Popen": Evil(__import__("subprocess").Popen, ["touch", "pwned"]),
    "torch.serialization.load": Evil(torch.load, "other.pt"),
    "numpy.load": Evil(np.load, "other.npy"),
    "functools.partial": Evil(__import__("functools").partial, print),
    "builtins.bytearray": Evil(bytearray, 10),
    "_pickle.loads": Evil(pickle.loads, pickle.dumps(1)),
}


@pytest.mark.parametrize("name", EVIL)
def test_crafted_pickle_is_refused_by_the_name_it_asks_for(tmp_path, name):
    bare = tmp_path / "bare.pkl"
    bare.write_bytes(pickle.dumps(EVIL[name]))
    message = refused(bare)
    assert f"asks for {name!r}" in message
    assert "nothing in it was executed" in message


@pytest.mark.parametrize("protocol", [3, 4])
def test_crafted_part_is_refused_wherever_it_hides(tmp_path, protocol):
    evil = Evil(eval, "open('pwned', 'w')")
    network = edm_nets.make_network(TINY)
    network._init_kwargs = {"label_dim": Evil(eval, "0")}
    places = {
        "item": {"model": 1, "other": [(evil,)]},
        "key": collections.OrderedDict([("a", evil)]),
        "argument": Evil(collections.OrderedDict, [("a", evil)]),
        "state": Evil(nn.Sigmoid, state={"a": evil}),
        "set": {1, "a", (2, evil)},
        "meta": Persistent("EPD_predictor", {"num_steps": evil}),
        "source": Persistent("EPD_predictor", {}, module_src=evil),
        "kwargs": {"ema": network},
        "twice": Evil(nn.Sigmoid, Evil(nn.Softmax, evil)),
    }
    for place, content in places.items():
        message = refused(pickles.dump(content, tmp_path / f"{place}.pkl", protocol))
        assert "'builtins.eval'" in message, place


def short_text(text):
    data = text.encode()
    return b"\x8c" + bytes([len(data)]) + data


def asking(module, name, rest):
    """A pickle of protocol 4 that gets `module.name`, then does `rest`."""
    return b"\x80\x04" + short_text(module) + short_text(name) + b"\x93" + rest + b"."


def test_dotted_names_reach_nothing(tmp_path):
    """`torch.nn.modules.module` imports modules of its own, through which a dotted name would come to `os`."""
    path = tmp_path / "dotted.pkl"
    path.write_bytes(asking("torch.nn.modules.module", "warnings.sys.modules", b")R"))
    found = safe_pickle.read(path)
    assert type(found).__mro__[1] is safe_pickle.Record and found.name.endswith("warnings.sys.modules")
    path.write_bytes(asking("torch.nn.modules.module", "torch.os.system", short_text("touch pwned") + b"\x85R"))
    assert safe_pickle.read(path).args == ("touch pwned",)
    path.write_bytes(asking("solvers", "os.system", short_text("touch pwned") + b"\x85R"))
    assert safe_pickle.read(path).args == ("touch pwned",)
    for module, name in (("torch.nn.modulesx", "a"), ("solversx", "a"), ("torch.nn", "Sigmoid"), ("os", "system"), ("", "eval"),
                         ("collections", "OrderedDict.__init__.__globals__"), ("numpy", "dtype.__class__")):  # fmt: skip
        path.write_bytes(asking(module, name, b")R"))
        assert repr(f"{module}.{name}") in refused(path)
    path.write_bytes(asking("os\n", "system\n", b")R"))
    assert "\\n" in refused(path)


def test_classes_of_the_reader_cannot_be_changed_by_a_pickle(tmp_path):
    path = tmp_path / "build.pkl"
    state = b"}" + short_text("name") + short_text("torch._utils._rebuild_tensor_v2") + b"s"
    path.write_bytes(asking("numpy", "dtype", b"N" + state + b"\x86b"))  # slot state for the class itself
    refused(path)
    path.write_bytes(asking("numpy", "dtype", state + b"b"))
    refused(path)
    path.write_bytes(asking("numpy", "dtype", b")R" + b"N" + state + b"\x86b"))  # for the object
    found = safe_pickle.read(path)
    assert found.name == "numpy.dtype" and found.state == (None, {"name": "torch._utils._rebuild_tensor_v2"})
    path.write_bytes(asking("numpy", "dtype", b"(" + short_text("x") + b"e"))  # append
    refused(path)
    assert safe_pickle.Record.name == ""


def test_persistent_ids_extensions_and_damage_are_refused(tmp_path):
    whole = pickle.dumps({"a": [1.0] * 50})
    for data in (b"Pother\n.", b"\x80\x04K\x01Q.", b"\x82\x01.", b"", b"a text file", whole[:-5], whole[5:], b"\x80\x09.",
                 b"\x80\x04\x96" + struct.pack("<Q", 1 << 62) + b".", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
                 b"PK\x03\x04 a zip file", b"r" + struct.pack("<I", 1 << 31) + b"."):  # fmt: skip
        path = tmp_path / "damaged.pkl"
        path.write_bytes(data)
        assert "is no pickle that can be read" in refused(path), data[:20]
    assert "cannot be read" in refused(tmp_path / "absent.pkl")
    assert "cannot be read" in refused(tmp_path)


def tensor_pickle(path, numbers=4, offset=0, size=(4,), stride=(1,), storage=None):
    """A layer whose one buffer claims this shape of a storage of `numbers`, or of the object `storage`."""
    class Lying:
        def __reduce__(self):
            source = torch.zeros(numbers)._typed_storage() if storage is None else storage
            return torch._utils._rebuild_tensor_v2, (source, offset, size, stride, False, collections.OrderedDict())

    return pickles.dump(Persistent("Net", {"_buffers": {"a": Lying()}}), path)


def weights_of(path):
    with safe_pickle.reading(path):
        return safe_pickle.state_dict(safe_pickle.read(path))


def test_tensor_that_lies_about_its_shape_is_refused(tmp_path):
    path = tmp_path / "lying.pkl"
    assert weights_of(tensor_pickle(path, 4, 1, (3,)))["a"].tolist() == [0, 0, 0]
    for shape in ({"size": (5,)}, {"offset": 1}, {"offset": -1}, {"size": (1 << 40,), "stride": (0,)},
                  {"stride": (2,)}, {"size": (2, 2)}, {"size": (-4,)}, {"size": (4.0,)}, {"size": [4]}, {"stride": (-1,)},
                  {"offset": "0"}):  # fmt: skip
        refused(tensor_pickle(path, **shape), weights_of)
    for storage in (b"bytes", 4, [1, 2]):
        assert "no storage" in refused(tensor_pickle(path, storage=storage), weights_of)


def test_code_inside_of_a_storage_is_refused_too(tmp_path):
    """A storage is a torch file in bytes: a pickle once more."""
    buffer = io.BytesIO()
    torch.save(Evil(eval, "open('pwned', 'w')"), buffer, _use_new_zipfile_serialization=False)
    zipped = io.BytesIO()
    torch.save({"a": Evil(os.system, "touch pwned")}, zipped)
    other = io.BytesIO()
    torch.save({"a": torch.ones(1)}, other)
    for data in (buffer.getvalue(), zipped.getvalue(), other.getvalue(), b"junk", b""):
        evil = Evil(torch.storage._load_from_bytes, data)
        message = refused(tensor_pickle(tmp_path / "storage.pkl", storage=evil), weights_of)
        assert "a tensor in it cannot be read" in message, data[:40]


def test_bombs_are_refused_quickly(tmp_path):
    path = tmp_path / "bomb.pkl"
    layers = [1]
    for _ in range(40):
        layers = [layers, layers]  # 2^40 values, 40 lists
    with pytest.raises(ValueError, match="too many"):
        safe_pickle.plain(safe_pickle.read(pickles.dump({"a": layers}, path)))
    deep = []
    for _ in range(400):
        deep = [deep]
    with pytest.raises(ValueError, match="deeply"):
        safe_pickle.plain(safe_pickle.read(pickles.dump(deep, path)))
    circle = []
    circle.append(circle)
    with pytest.raises(ValueError, match="deeply"):
        safe_pickle.plain(safe_pickle.read(pickles.dump(circle, path)))
    layer = Persistent("Net", {})
    for _ in range(40):
        layer = Persistent("Net", {"_modules": {"a": layer, "b": layer}})
    assert "too many" in refused(pickles.dump(layer, path), weights_of)


def test_wrong_networks_are_refused(tmp_path):
    path = tmp_path / "other.pkl"
    for content, words in (
        ([1], "holds no network under 'ema'"),
        ({"model": Persistent("EDMPrecond", {})}, "holds no network under 'ema'"),
        ({"ema": 3}, "holds no network under 'ema'"),
        ({"ema": Persistent("VPPrecond", {})}, "holds a network of the class 'VPPrecond'"),
        ({"ema": Persistent("EDMPrecond", {"_modules": {"a": 1}})}, "something else where a network or layer must be"),
        ({"ema": Persistent("EDMPrecond", {"_buffers": {"a": 1}})}, "something else where a tensor must be"),
        ({"ema": Persistent("EDMPrecond", {"_buffers": [1]})}, "something else where a mapping must be"),
        ({"ema": Persistent("EDMPrecond", {}, type="function")}, "lacks its class"),
        ({"ema": Persistent("EDMPrecond", 5)}, "something else where a mapping must be"),
    ):
        assert words in refused(pickles.dump(content, path), safe_pickle.read_network), content


def test_synthetic_pickles_are_what_they_claim(tmp_path):
    """The pickles of these tests ask for the names that the published ones ask for, and stock unpickling would act."""
    path, _ = edm_pickle(tmp_path / "net.pkl", TINY)
    texts = [text for code, text, _ in pickletools.genops(path.read_bytes()) if "UNICODE" in code.name]
    assert {"torch_utils.persistence", "_reconstruct_persistent_obj", "_rebuild_parameter", "_load_from_bytes"} <= set(texts)
    with pickles.foreign_modules(), pytest.raises(AssertionError, match="reconstructed"):
        pickle.loads(path.read_bytes())
