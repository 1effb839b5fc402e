"""Weights from elsewhere: files of their layouts, made here, give what their own networks give."""

from __future__ import annotations

import argparse
import json
import os
import sys
import types
import warnings
import zipfile

import numpy as np
import onnx
import pytest
import torch
from heads_for_tests import make_head
from onnx import helper, numpy_helper
from torch import nn

from chebface import arcface, checkpoint, config, foreign, params, regressor, train
from chebface.arcface import BACKBONES, build_backbone
from chebface.errors import AssetError, ConfigError, InputError, MissingDependencyError, UnsafeFileError
from chebface.heads import asset

CROPS = 2 * torch.rand((2, 3, 112, 112), generator=torch.Generator().manual_seed(7)) - 1


def trained(name):
    """A backbone whose every number is its own, as after training."""
    generator = torch.Generator().manual_seed(3)
    network = build_backbone(name).eval()
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise + 0.5 if key.endswith(("weight", "running_var")) else noise - 0.5)
    return network


def embed(network):
    with torch.inference_mode():
        return network.eval()(CROPS)


def assert_same(got, want, tolerance=1e-5):
    assert (got - want).norm() <= tolerance * want.norm() > 0


@pytest.fixture(scope="module")
def light():
    return trained("light")


@pytest.fixture(scope="module")
def head():
    return make_head(6)


@pytest.fixture
def head_file(tmp_path, head):
    return str(asset.save(head, tmp_path / "head.npz"))


@pytest.fixture
def published(tmp_path, light):
    """A recognition checkpoint, as older releases wrote it: without counters."""
    path = tmp_path / "backbone.pth"
    torch.save({k: v for k, v in light.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return path


class Mapping(nn.Module):
    """MICA's mapping network in plain torch: 4 layers of 300 with LeakyReLU 0.2, then FLAME's shape coefficients."""

    def __init__(self, layers=4):
        super().__init__()
        self.network = nn.ModuleList([nn.Linear(300 if i else 512, 300) for i in range(layers)])
        self.output = nn.Linear(300, 300)

    def forward(self, embedding):
        for layer in self.network:
            embedding = nn.functional.leaky_relu(layer(embedding), 0.2)
        return self.output(embedding)


def mica(backbone, mapping, head, **more):
    dirs = np.concatenate([head.shape_dirs, head.expression_dirs]).transpose(1, 2, 0)
    generator = {
        "faces_tensor": torch.from_numpy(head.faces).long(),
        "v_template": torch.from_numpy(head.template),
        "shapedirs": torch.from_numpy(np.ascontiguousarray(dirs)),
        "eye_pose": torch.zeros(1, 6),
    }
    flame = {f"regressor.{k}": v for k, v in mapping.state_dict().items()}
    flame |= {f"generator.{k}": v for k, v in generator.items()}
    return {"flameModel": flame, "arcface": backbone.state_dict(), "epoch": 3, "global_step": 40, **more}


@pytest.fixture
def mica_file(tmp_path, light, head):
    torch.manual_seed(5)
    mapping = Mapping().eval()
    optimizer = torch.optim.Adam(mapping.parameters())
    mapping(torch.rand(2, 512)).sum().backward()
    optimizer.step()
    validator = {"embeddings_lyhm": {"actor": [np.ones(3, np.float32)]}, "best_model": {"average": np.float64(0.9)}}
    more = {"opt": optimizer.state_dict(), "validator": validator}
    path = tmp_path / "mica.tar"
    torch.save(mica(light, mapping, head, **more), path)
    return mapping, path


# arcface_torch


def test_backbones_are_told_apart_by_their_weights():
    for name in BACKBONES:
        with torch.device("meta"):
            weights = build_backbone(name).state_dict()
        for before in ("", "arcface.", "state_dict_backbone.module."):
            assert foreign._find_backbone({before + key: t for key, t in weights.items()}) == (name, before)


def test_a_deeper_network_is_not_taken_for_the_one_inside_it():
    with torch.device("meta"):
        weights = arcface.IResNet((6, 26, 60, 6)).state_dict()
    with pytest.raises(AssetError, match=r"nearest is iresnet100, .* layer1\.3\.bn1\.weight is one too many"):
        foreign._find_backbone(weights)


def test_published_weights_embed_as_they_did(published, light):
    found = foreign.read(published)
    assert (found.kind, found.backbone, found.left) == ("arcface", "light", {})
    assert torch.equal(embed(foreign.load_backbone("light", published)), embed(light))


def test_training_checkpoints_give_their_backbone(tmp_path, light):
    """Partial FC's centers, optimizer and settings, some of them objects of numpy, argparse and yacs."""
    path = tmp_path / "checkpoint_gpu_0.pt"
    record = {
        "epoch": np.int64(4),
        "lr": np.arange(3.0),
        "args": argparse.Namespace(network="mbf"),
        "state_dict_backbone": {f"module.{k}": v for k, v in light.state_dict().items()},
        "state_dict_softmax_fc": {"weight": torch.zeros(9, 512)},
    }
    with pytest.MonkeyPatch.context() as patch:
        CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
        module = types.ModuleType("yacs.config")
        module.CfgNode = CfgNode
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        settings = CfgNode(batch=8)
        settings.frozen = True
        torch.save(record | {"cfg": settings}, path)
    allowed = set(torch.serialization.get_safe_globals())
    found = foreign.read(path)
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert "partial FC" in found.left.pop("state_dict_softmax_fc")
    assert set(found.left) == {"epoch", "lr", "args", "cfg"}
    assert torch.equal(embed(foreign.load_backbone("light", path)), embed(light))


def test_safetensors_and_our_own_checkpoints_give_their_backbone(tmp_path, light):
    plain = checkpoint.save(tmp_path / "plain.safetensors", light.state_dict(), {})
    assert torch.equal(embed(foreign.load_backbone("light", plain)), embed(light))
    ours = {f"backbone.{k}": v for k, v in light.state_dict().items()} | {"mapping.0.weight": torch.zeros(300, 512)}
    checkpoint.save(tmp_path / "half.safetensors", checkpoint.half(ours), {})
    assert_same(embed(foreign.load_backbone("light", tmp_path / "half.safetensors")), embed(light), 1e-2)


def test_a_recognition_network_becomes_a_start_for_training(tmp_path, published, light, head_file, head):
    report = foreign.adopt(published, tmp_path / "start.safetensors", head=head_file, backbone="light")
    assert report["taken"] == {"backbone": len(torch.load(published, weights_only=True))}
    assert report["untrained"] == ["mapping", "output"]
    model, card = checkpoint.load_regressor(tmp_path / "start.safetensors")
    assert torch.equal(embed(model.backbone), embed(light))
    assert model.output.weight.abs().min(1).values.max() > 0  # a fresh output starves nothing
    checkpoint.check_head(card, head)
    again = foreign.adopt(published, tmp_path / "again.safetensors", head=head_file)
    assert again["left"] == {}
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "start.safetensors").read_bytes()


# MICA


@pytest.mark.parametrize("unit", [1.0, 2.5])
def test_shapes_are_those_of_mica(tmp_path, monkeypatch, mica_file, light, head_file, unit):
    monkeypatch.setitem(regressor.OUTPUT_UNIT, "shape", (unit,))
    mapping, path = mica_file
    foreign.adopt(path, tmp_path / "out.safetensors", head=head_file)
    model, _ = checkpoint.load_regressor(tmp_path / "out.safetensors")
    with torch.inference_mode():
        want = mapping(nn.functional.normalize(light(CROPS)))
        got = params.split(model(CROPS))
    assert_same(got["shape"], want, 1e-6)
    assert want.std(0).min() > 0
    for part, values in got.items():
        if part != "shape":
            assert torch.equal(values, model.offset[params.SLICES[part]].expand_as(values))
    assert got["camera"][0].tolist() == pytest.approx(regressor.CAMERA_BIAS)


def test_the_report_says_what_was_taken_and_what_not(tmp_path, mica_file, head_file, head):
    report = foreign.adopt(mica_file[1], tmp_path / "out.safetensors", head=head_file)
    assert json.loads(json.dumps(report)) == report
    assert (report["kind"], report["backbone"], report["head"]) == ("mica", "light", head.facts)
    assert report["taken"] == {"backbone": 127, "mapping": 8, "shape": 2}
    assert set(report["left"]) == {"flameModel.generator", "opt", "validator", "epoch", "global_step"}
    assert report["untrained"] == [f"output: {part}" for part in params.PARTS if part != "shape"]
    assert "compared vertex by vertex" in report["notes"][0]
    _, card = checkpoint.load_regressor(report["output"])
    assert card["adopted"]["sha256"] == report["sha256"]
    assert card["training"]["head"] == head_file
    checkpoint.check_head(card, head)


def test_training_starts_from_mica(tmp_path, mica_file, head_file, head):
    start = tmp_path / "out.safetensors"
    foreign.adopt(mica_file[1], start, head=head_file)
    overrides = (f"start={start}", f"head={head_file}", "backbone=light", "normalize_embedding=true")
    model = train.build_model(config.load(config.TrainReconstructor, None, overrides), head)
    for name, tensor in checkpoint.load(start)[0].items():
        assert torch.equal(model.state_dict()[name], tensor)
    (model.train()(CROPS) - 1).square().sum().backward()
    assert model.output.weight.grad.abs().sum(1).min() > 0
    assert model.mapping[0].weight.grad.abs().max() > 0


def test_mica_gives_a_backbone_alone(mica_file, light):
    assert torch.equal(embed(foreign.load_backbone("light", mica_file[1])), embed(light))


@pytest.mark.parametrize("other", [make_head(6, seed=1), make_head(7)], ids=["other shapes", "other size"])
def test_mica_wants_the_head_it_was_trained_with(tmp_path, mica_file, other):
    path = asset.save(other, tmp_path / "other.npz")
    with pytest.raises(AssetError, match=r"mica\.tar: was trained with another head than test"):
        foreign.adopt(mica_file[1], tmp_path / "out.safetensors", head=str(path))
    assert not (tmp_path / "out.safetensors").exists()


def test_without_a_flame_inside_the_head_is_taken_at_its_word(tmp_path, light, head, head_file):
    record = mica(light, Mapping(), head)
    record["flameModel"] = {k: v for k, v in record["flameModel"].items() if k.startswith("regressor.")}
    torch.save(record, tmp_path / "slim.tar")
    report = foreign.adopt(tmp_path / "slim.tar", tmp_path / "out.safetensors", head=head_file)
    assert "is your word" in report["notes"][0]


@pytest.mark.parametrize(
    ("layers", "says"), [(3, r"network\.3\.bias: .* got none"), (5, r"network\.4\.bias: wanted none")]
)
def test_another_mapping_network_is_refused(tmp_path, light, head, layers, says):
    torch.save(mica(light, Mapping(layers), head), tmp_path / "mica.tar")
    with pytest.raises(AssetError, match=says):
        foreign.read(tmp_path / "mica.tar")


# DECA


def test_deca_does_not_fit_and_says_why(tmp_path, head_file):
    encoder = {"encoder.conv1.weight": torch.zeros(64, 3, 7, 7), "layers.2.weight": torch.zeros(236, 1024)}
    path = tmp_path / "deca_model.tar"
    torch.save({"E_flame": encoder, "E_detail": encoder, "D_detail": {}, "global_step": 1}, path)
    found = foreign.read(path)
    assert (found.kind, found.backbone, found.tensors) == ("deca", None, {})
    assert set(found.left) == {"E_flame", "E_detail", "D_detail", "global_step"}
    for use in (
        lambda: foreign.adopt(path, tmp_path / "out.safetensors", head=head_file),
        lambda: foreign.load_backbone("iresnet50", path),
    ):
        with pytest.raises(AssetError, match=r"deca_model\.tar: DECA: nothing of it fits.*ResNet-50.*preset=deca"):
            use()
    assert not (tmp_path / "out.safetensors").exists()


# ONNX


def export(network, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (CROPS[:1],), str(path), input_names=["input.1"], **options)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory, light):
    """As insightface's: torchscript, opset 11, folded batch norms, lost names."""
    return export(light, tmp_path_factory.mktemp("onnx") / "light.onnx", dynamo=False, opset_version=11)


def edit(source, path, change):
    proto = onnx.load(str(source))
    change(proto)
    onnx.save(proto, str(path))
    return path


def only(proto, kind):
    return next(node for node in proto.graph.node if node.op_type == kind)


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet"])
def test_exported_networks_embed_as_they_did(tmp_path, monkeypatch, name):
    monkeypatch.setitem(arcface._IRESNET_BLOCKS, "iresnet18", (1, 1, 1, 1))
    network = trained(name)
    path = export(network, tmp_path / "w600k.onnx", dynamo=False, opset_version=11)
    names = {tensor.name for tensor in onnx.load(str(path)).graph.initializer}
    assert len(names & network.state_dict().keys()) < len(names) / 2  # they are lost, so nothing can go by them
    assert_same(embed(foreign.load_backbone(name, path)), embed(network))


def test_newer_exporters_are_read_too(tmp_path, light):
    """They fold the last norm into the linear layer and reshape where others flatten."""
    path = export(light, tmp_path / "new.onnx", dynamo=True, opset_version=18, external_data=False, verbose=False)
    assert_same(embed(foreign.load_backbone("light", path)), embed(light))


def test_norms_that_were_not_folded_keep_their_statistics(tmp_path, light):
    path = export(light, tmp_path / "whole.onnx", dynamo=False, training=torch.onnx.TrainingMode.PRESERVE)
    found = foreign.read(path)
    assert_same(embed(foreign.load_backbone("light", path)), embed(light))
    mean = "layers.0.bn1.running_mean"
    assert torch.equal(found.tensors[f"backbone.{mean}"], light.state_dict()[mean])


def test_another_epsilon_is_made_up_for(tmp_path, exported):
    import onnxruntime

    def change(proto):
        for node in proto.graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 0.3

    path = edit(exported, tmp_path / "eps.onnx", change)
    session = onnxruntime.InferenceSession(str(path))
    want = torch.from_numpy(session.run(None, {"input.1": CROPS[:1].numpy()})[0])
    assert_same(embed(foreign.load_backbone("light", path))[:1], want)


def test_an_exported_network_becomes_a_checkpoint(tmp_path, exported, light, head_file):
    report = foreign.adopt(exported, tmp_path / "out.safetensors", head=head_file)
    assert (report["kind"], report["backbone"], report["taken"]) == ("onnx", "light", {"backbone": 127})
    assert "run beside onnxruntime" in report["notes"][0] and "18 batch norms came folded" in report["notes"][1]
    assert_same(embed(checkpoint.load_regressor(report["output"])[0].backbone), embed(light))


def normalizes_first(proto):
    first = only(proto, "Conv")
    proto.graph.node.insert(0, helper.make_node("Sub", ["input.1", "mean"], ["centred"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.float32([127.5]), "mean"))
    first.input[0] = "centred"


def goes_on(proto):
    proto.graph.node.append(helper.make_node("Tanh", [proto.graph.output[0].name], ["squeezed"]))
    proto.graph.output[0].name = "squeezed"


def computes_a_weight(proto):
    node = only(proto, "PRelu")
    proto.graph.node.insert(0, helper.make_node("Neg", [node.input[1]], ["negated"]))
    node.input[1] = "negated"


def has_one_slope(proto):
    proto.graph.initializer.append(numpy_helper.from_array(np.float32([[[0.1]]]), "slope"))
    only(proto, "PRelu").input[1] = "slope"


def shifts_the_crop(proto):
    """The same layers, but padding that the walk does not look at."""
    for attribute in only(proto, "Conv").attribute:
        if attribute.name == "pads":
            attribute.ints[:] = [2, 2, 0, 0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (normalizes_first, "at stem.layers.0 wanted one Conv, got Sub"),
        (goes_on, "goes on after the embedding"),
        (computes_a_weight, "input 1 of PRelu is no constant"),
        (has_one_slope, r"wanted \(24,\), got \(1,\)"),
        (shifts_the_crop, "give another embedding"),
        (lambda proto: proto.graph.node.remove(only(proto, "Conv")), "has 17 convolutions .* wanted iresnet18 21"),
        (lambda proto: proto.graph.output.append(proto.graph.output[0]), "one input and one output, got 1 and 2"),
        (lambda proto: proto.graph.node.append(helper.make_node("Nonsense", ["input.1"], ["x"])), "does not run it"),
    ],
)
def test_other_graphs_are_refused(tmp_path, exported, change, says):
    path = edit(exported, tmp_path / "other.onnx", change)
    with pytest.raises(AssetError, match=rf"other\.onnx: .*{says}"):
        foreign.read(path)


def test_onnx_files_want_onnx(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match="onnx is not installed"):
        foreign.read(exported)


# whatever else comes


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return (os.system, ("touch trapped",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><title>Google Drive - Quota exceeded", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"not a checkpoint", "nothing that torch.save wrote"),
        ({"fc.weight": torch.zeros(2)}, "no face recognition network .* fc.weight"),
        ([torch.zeros(2)], "expected named tensors, got list"),
    ],
)
def test_other_files_are_refused(tmp_path, content, says):
    path = tmp_path / "backbone.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(AssetError, match=rf"backbone\.pth: .*{says}"):
        foreign.read(path)


@pytest.mark.parametrize("name", ["light.onnx", "light.safetensors", "light.pth"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_half_a_download_is_refused(tmp_path, exported, published, light, name, share):
    sources = {"light.onnx": exported, "light.pth": published}
    source = sources.get(name) or checkpoint.save(tmp_path / "whole.safetensors", light.state_dict(), {})
    (tmp_path / name).write_bytes(source.read_bytes()[: int(share * source.stat().st_size)])
    with pytest.raises(AssetError, match=rf"{name}: .*damaged"):
        foreign.read(tmp_path / name)


def test_folders_and_packs_are_named(tmp_path):
    with pytest.raises(AssetError, match="is a folder"):
        foreign.read(tmp_path)
    with zipfile.ZipFile(tmp_path / "buffalo_l.zip", "w") as pack:
        pack.writestr("w600k_r50.onnx", "x")
    with pytest.raises(AssetError, match=r"archive of w600k_r50\.onnx; unpack it"):
        foreign.read(tmp_path / "buffalo_l.zip")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("content", [Trap(), nn.Linear(1, 1)], ids=["trap", "module"])
def test_no_file_runs_code(tmp_path, monkeypatch, light, content, legacy):
    monkeypatch.chdir(tmp_path)
    record = {"arcface": {"fc.weight": torch.zeros(2)}, "extra": content}
    torch.save(record, "mica.tar", _use_new_zipfile_serialization=not legacy)
    asked = "torch.nn.modules.linear.Linear" if isinstance(content, nn.Module) else f"{os.name}.system"
    with pytest.raises(UnsafeFileError, match=rf"mica\.tar: asks for {asked} .*torch\.save\(model\.state_dict"):
        foreign.read("mica.tar")
    assert not (tmp_path / "trapped").exists()


def test_damaged_numbers_are_refused(tmp_path, light):
    weights = light.state_dict()
    torch.save(weights | {"features.layers.2.weight": torch.full((512, 512), torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(AssetError, match=r"not finite: backbone\.features\.layers\.2\.weight \(1 of 127"):
        foreign.read(tmp_path / "nan.pth")


def test_another_backbone_than_the_wanted_is_refused(tmp_path, published, head_file):
    with pytest.raises(AssetError, match="not those of iresnet100, but of light"):
        foreign.load_backbone("iresnet100", published)
    with pytest.raises(AssetError, match="not those of iresnet50, but of light"):
        foreign.adopt(published, tmp_path / "out.safetensors", head=head_file, backbone="iresnet50")
    with pytest.raises(ConfigError, match="resnet7"):
        foreign.load_backbone("resnet7", published)


def test_what_was_there_stays(tmp_path, monkeypatch, published, head_file):
    before = published.read_bytes()
    with pytest.raises(InputError, match="another file than the one that is read"):
        foreign.adopt(published, published, head=head_file)
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        foreign.adopt(published, output, head=head_file)
    assert (published.read_bytes(), output.read_bytes()) == (before, b"older")
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(AssetError, match="nowhere"):
        foreign.adopt(published, output, head=str(tmp_path / "nowhere.npz"))


def test_the_command_says_what_was_taken_and_what_was_not(tmp_path):
    from click.testing import CliRunner

    from chebface.cli import main

    torch.manual_seed(3)
    torch.save(build_backbone("light").state_dict(), tmp_path / "backbone.pth")
    head = asset.save(make_head(6), tmp_path / "small.npz")
    wanted = ["weights", "import", str(tmp_path / "backbone.pth"), "--head", str(head)]
    done = CliRunner().invoke(main, [*wanted, "-o", str(tmp_path / "ours.safetensors")])
    assert done.exit_code == 0 and "light; taken: backbone" in done.output and "untrained: mapping" in done.output
    (tmp_path / "backbone.pth").write_bytes(b"<html>not found</html>")
    failed = CliRunner().invoke(main, [*wanted, "-o", str(tmp_path / "other.safetensors"), "--json"])
    assert failed.exit_code == 1 and '"ok": false' in failed.output and not (tmp_path / "other.safetensors").exists()
