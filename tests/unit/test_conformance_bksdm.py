"""Golden numbers of BK-SDM: every file of a known name under `--conformance DIR`/bksdm is run."""

import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from brisk import bksdm, macs, samples, schedules, sd_inputs
from brisk.feature_taps import FeatureTaps
from brisk.tiny import make_text_encoder, make_vae

OURS = {"sd_base": "bk_base", "sd_small": "bk_small", "sd_tiny": "bk_tiny", "sdxl_small": "small_sd_xl",
        "sdxl_tiny": "tiny_sd_xl"}  # fmt: skip
TEACHERS = {"sd1": "sd1_teacher", "sd2_base": "sd2_base_teacher", "sd2_v": "sd2_v_teacher"}


def fill(name, shape, kind, salt=""):
    """The deterministic tensor of the files' README, float64."""
    count = math.prod(shape)
    mask = np.uint64(0xFFFFFFFF)
    z = (np.uint64(2654435761) * np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32((salt + name).encode()))) & mask
    z = ((z ^ (z >> np.uint64(16))) * np.uint64(0x7FEB352D)) & mask
    z = ((z ^ (z >> np.uint64(15))) * np.uint64(0x846CA68B)) & mask
    z = z ^ (z >> np.uint64(16))
    r = torch.from_numpy(math.sqrt(3) * (2 * (z.astype(np.float64) + 0.5) / 2**32 - 1)).reshape(shape)
    if kind == "data":
        return r
    if len(shape) >= 2:
        return r / math.sqrt(count / shape[0])
    return 0.05 * r if name.endswith(".bias") else 1 + 0.1 * r


def preset_and_teacher(name):
    """("bk_base", "sd1_teacher") of "bk_base_sd1", ("small_sd_xl", "sdxl_teacher") of "sdxl_small", ..."""
    for suffix, teacher in TEACHERS.items():
        if name.endswith(f"_{suffix}"):
            return name.removesuffix(f"_{suffix}"), teacher
    return OURS.get(name, name), "sdxl_teacher"


def meta_keys(config):
    with torch.device("meta"):
        return {key: value.shape for key, value in UNet2DConditionModel(**config).state_dict().items()}


def configs(folder):
    return json.loads((folder / "student_configs.json").read_text())


def teacher_and_student(folder, preset):
    """Configs of a preset's student and of the published teacher of its family."""
    known = configs(folder)
    teacher = known["sdxl_teacher" if bksdm.PRESETS[preset].family == "sdxl" else "sd1_teacher"]
    return teacher, bksdm.derive_student_config(teacher, preset)


def check_student_configs(golden, folder):
    for name, config in golden.items():
        if name.endswith("_teacher"):
            continue
        preset, teacher = preset_and_teacher(name)
        assert bksdm.resolve_preset(preset, golden[teacher]) == preset
        assert bksdm.derive_student_config(golden[teacher], preset) == config, name


def check_param_counts(golden, folder):
    known = configs(folder)
    for name, entry in golden["unets"].items():
        size = macs.unet_size(known[name], entry["latent_size"], entry["text_tokens"])
        assert (size.parameters, size.conv, size.linear, size.attention, size.total, size.published) == (
            entry["params"], entry["macs_conv"], entry["macs_linear"], entry["macs_attention_matmul"],
            entry["macs_total"], entry["macs_thop_convention"],
        ), name  # fmt: skip
        assert len(meta_keys(known[name])) == entry["state_dict_entries"]
    others = golden["others"]
    with torch.device("meta"):
        encoders = {"text_encoder_sd1": make_text_encoder("clip_l"),
                    "text_encoder_2_sdxl": make_text_encoder("open_clip_g", projection=True)}  # fmt: skip
        vae = make_vae("sd15")
        for name, encoder in encoders.items():
            size = macs.count(encoder, input_ids=torch.zeros(1, 77, dtype=torch.long))
            assert (size.parameters, size.total) == (others[name]["params"], others[name]["macs_total_77tok"]), name
        for pixels in (512, 768, 1024):
            latent, halves = pixels // 8, {"encoder": 0, "decoder": 0}
            halves["encoder"] += macs.count(vae.encoder, sample=torch.empty(1, 3, pixels, pixels)).total
            halves["encoder"] += macs.count(vae.quant_conv, input=torch.empty(1, 8, latent, latent)).total
            halves["decoder"] += macs.count(vae.decoder, sample=torch.empty(1, 4, latent, latent)).total
            halves["decoder"] += macs.count(vae.post_quant_conv, input=torch.empty(1, 4, latent, latent)).total
            for half, total in halves.items():
                assert total == others[f"vae_{half}"][f"macs_{pixels}"], half


def assert_map(mapping, golden):
    lines = "\n".join(f"{key}\t{mapping[key]}" for key in sorted(mapping))
    assert len(mapping) == golden["entries"]
    assert {key: source for key, source in mapping.items() if key != source} == golden["renamed"]
    assert hashlib.sha256(lines.encode()).hexdigest() == golden["sha256_of_sorted_tab_lines"]


def check_whole_map(golden, folder, preset):
    teacher, student = teacher_and_student(folder, preset)
    assert bksdm.weight_map(meta_keys(student), student, teacher) == golden


def check_weight_map_sd(golden, folder):
    for name, mapping in golden.items():
        check_whole_map(mapping, folder, OURS[name])


def check_weight_map_sdxl_small(golden, folder):
    check_whole_map(golden, folder, "small_sd_xl")


def check_weight_map_sdxl_tiny(golden, folder):
    check_whole_map(golden, folder, "tiny_sd_xl")


def check_weight_map_other(golden, folder):
    for name, entry in golden.items():
        teacher, student = teacher_and_student(folder, OURS.get(name, name))
        assert_map(bksdm.weight_map(meta_keys(student), student, teacher), entry)


def check_weight_map_general(golden, folder):
    for entry in golden.values():
        teacher, student = entry["teacher_config"], entry["student_config"]
        mapping = bksdm.weight_map(meta_keys(student), student, teacher)
        assert_map(mapping, entry)
        bksdm.check_weights(mapping, meta_keys(student), meta_keys(teacher))


def check_feature_pairs(golden, folder):
    for name, pairs in golden.items():
        name, feature_set = name.split("/")
        teacher, student = teacher_and_student(folder, OURS.get(name, name))
        mapping = bksdm.weight_map(meta_keys(student), student, teacher)
        assert bksdm.feature_pairs(feature_set, mapping, student, teacher) == [tuple(pair) for pair in pairs], name


def filled(config, dtype):
    unet = UNet2DConditionModel(**config)
    unet.load_state_dict({key: fill(key, value.shape, "auto") for key, value in unet.state_dict().items()})
    return unet.to(dtype)


def loss_case(case, dtype, checkpointing):
    """(pairs' losses, task, output, gradients of the total, of the features alone) computed by our functions."""
    teacher = filled(case["teacher_config"], dtype).eval().requires_grad_(False)
    student = UNet2DConditionModel(**case["student_config"]).to(dtype).train()
    state = teacher.state_dict()
    mapping = bksdm.weight_map(student.state_dict(), case["student_config"], case["teacher_config"])
    bksdm.check_weights(mapping, {k: v.shape for k, v in student.state_dict().items()}, {k: v.shape for k, v in state.items()})
    student.load_state_dict({key: state[source] for key, source in mapping.items()})
    if checkpointing:
        student.enable_gradient_checkpointing()
    data = {name: fill(f"input/{name}", shape, "data").to(dtype) for name, shape in case["input_shapes"].items()}
    a, s = schedules.signal_and_noise(torch.tensor(case["alphas_cumprod"], dtype=dtype), data["latents"])
    noisy = a * data["latents"] + s * data["noise"]
    target = schedules.prediction_target(data["latents"], data["noise"], a, s, case["prediction_type"])
    call = {"encoder_hidden_states": data["text"], "return_dict": False}
    if "pooled" in data:
        ids = torch.tensor(case["time_ids"], dtype=dtype)
        call["added_cond_kwargs"] = {"text_embeds": data["pooled"], "time_ids": ids}
    timesteps = torch.tensor(case["timesteps"])
    pairs = bksdm.feature_pairs(case["feature_set"], mapping, case["student_config"], case["teacher_config"])
    of_teacher, of_student = (FeatureTaps(net, [pair[i] for pair in pairs]) for i, net in enumerate((teacher, student)))
    of_teacher.arm()
    with torch.no_grad():
        teacher_out = teacher(noisy, timesteps, **call)[0]
    of_student.arm()
    student_out = student(noisy, timesteps, **call)[0]
    terms = bksdm.feature_loss(of_student.read(), of_teacher.read())
    task, output = bksdm.output_loss(student_out, target), bksdm.output_loss(student_out, teacher_out)
    parameters = dict(student.named_parameters())
    total = torch.autograd.grad(task + output + terms.sum(), parameters.values(), retain_graph=True)
    # feature terms do not reach the last layers
    alone = torch.autograd.grad(terms.sum(), parameters.values(), allow_unused=True)
    total, alone = (dict(zip(parameters, grads, strict=True)) for grads in (total, alone))
    return pairs, terms, task, output, teacher_out, student_out, total, alone


def assert_losses(case, dtype, checkpointing):
    near = {"rel": 1e-6 if dtype == torch.float64 else 1e-4, "abs": 1e-6}
    steep = {"rel": 1e-6 if dtype == torch.float64 else 1e-3, "abs": 1e-6}
    pairs, terms, task, output, teacher_out, student_out, total, alone = loss_case(case, dtype, checkpointing)
    assert [pair["teacher"] for pair in case["pairs"]] == [pair[0] for pair in pairs]
    assert [pair["student"] for pair in case["pairs"]] == [pair[1] for pair in pairs]
    assert terms.tolist() == pytest.approx([pair["mse"] for pair in case["pairs"]], **near)
    assert task.item() == pytest.approx(case["loss_task"], **near)
    assert output.item() == pytest.approx(case["loss_out"], **near)
    assert terms.sum().item() == pytest.approx(case["loss_feat"], **near)
    assert (task + output + terms.sum()).item() == pytest.approx(case["loss_total_111"], **near)
    assert teacher_out.flatten()[:8].tolist() == pytest.approx(case["teacher_pred_head"], rel=1e-3, abs=1e-5)
    assert student_out.flatten()[:8].tolist() == pytest.approx(case["student_pred_head"], rel=1e-3, abs=1e-5)

    def norm(grads):
        return math.sqrt(sum(grad.double().square().sum().item() for grad in grads if grad is not None))

    assert norm(total.values()) == pytest.approx(case["grad_norm_total_111"], **steep)
    assert norm(alone.values()) == pytest.approx(case["grad_norm_feat_only"], **steep)
    for grads, golden in ((total, case["grad_norms_total_111"]), (alone, case["grad_norms_feat_only"])):
        for name, value in golden.items():
            assert norm([grads[name]]) == pytest.approx(value, **steep), name


def check_losses(golden, folder):
    for case in golden:
        for dtype, checkpointing in ((torch.float64, False), (torch.float32, False), (torch.float64, True)):
            assert_losses(case, dtype, checkpointing)


def check_options(golden, folder):
    from diffusers import DDPMScheduler

    schedule = dict(golden["schedule"])
    timesteps = torch.tensor(schedule.pop("timesteps"))
    table = torch.tensor(schedule.pop("alphas_cumprod"), dtype=torch.float64)
    snr = schedule.pop("snr")
    found = DDPMScheduler(**schedule).alphas_cumprod[timesteps]
    assert found.tolist() == pytest.approx(table.tolist(), rel=1e-5)
    assert (table / (1 - table)).tolist() == pytest.approx(snr, rel=1e-5)
    for name, by_type in golden["min_snr"].items():
        for kind, expected in by_type.items():
            weights = bksdm.min_snr_weights(table, float(name.removeprefix("gamma=")), kind)
            assert weights.tolist() == pytest.approx(expected, rel=1e-5)
    for kind, expected in golden["debias"].items():
        assert bksdm.debias_weights(table, kind).tolist() == pytest.approx(expected, rel=1e-5)
    for name, expected in golden["random_conditioning_p"].items():
        chance = bksdm.unpaired_probability(timesteps, float(name.removeprefix("lambda=")), 1000)
        assert chance.tolist() == pytest.approx(expected, rel=1e-5)
    for case in golden["sdxl_time_ids"]:
        check_time_ids(case)
    decays = [bksdm.ema_decay(update, golden["ema"]["decay"]) for update in golden["ema"]["update"]]
    assert decays == pytest.approx(golden["ema"]["decay_at_update"], abs=1e-12)
    shadow = 0.0
    for update, (value, expected) in enumerate(zip(*golden["ema_trace"].values(), strict=True), 1):
        decay = bksdm.ema_decay(update, golden["ema"]["decay"])
        shadow = decay * shadow + (1 - decay) * value
        assert shadow == pytest.approx(expected, rel=1e-9)
    for entry in golden["fill"]:  # proves the generator above, which the losses rest on
        values = fill(entry["name"], entry["shape"], entry["kind"], entry["salt"])
        assert values.flatten()[: len(entry["first"])].tolist() == pytest.approx(entry["first"], rel=1e-9)
        assert values.sum().item() == pytest.approx(entry["sum"], rel=1e-9, abs=1e-9)


class Scripted:
    """In place of a random generator: a crop at the given offset, a flip or not."""

    def __init__(self, top_left, flip):
        self.top_left, self.flip = list(top_left), flip

    def integers(self, high):
        offset = self.top_left.pop(0)
        assert offset < high
        return offset

    def random(self):
        return 0.0 if self.flip else 1.0


def check_time_ids(case):
    from PIL import Image

    height, width = case["original_hw"]
    scaled = samples.scaled_size(width, height, case["resolution"])
    assert list(reversed(scaled)) == case["resized_hw"]
    decode = samples.ImageCaptions(lambda text: {}, case["resolution"], random_flip=True)
    rng = Scripted(case["crop_top_left_before_flip"], case["flip"])
    pixels, crop, flipped = decode.cut(Image.new("RGB", (width, height)), rng)
    ids = sd_inputs.time_ids(torch.tensor([[height, width]]), torch.tensor([crop]), case["resolution"])
    assert ids[0].tolist() == case["time_ids"]
    assert flipped == case["flip"] and pixels.shape == (3, case["resolution"], case["resolution"])


KNOWN = {
    "student_configs": check_student_configs, "param_counts": check_param_counts,
    "weight_map_sd": check_weight_map_sd, "weight_map_sdxl_small": check_weight_map_sdxl_small,
    "weight_map_sdxl_tiny": check_weight_map_sdxl_tiny, "weight_map_other": check_weight_map_other,
    "weight_map_general": check_weight_map_general, "feature_pairs": check_feature_pairs,
    "losses_sd_eps": check_losses, "losses_sd_vpred": check_losses, "losses_sdxl": check_losses,
    "options": check_options,
}  # fmt: skip


def pytest_generate_tests(metafunc):
    folder = Path(metafunc.config.getoption("--conformance")) / "bksdm"
    found = [folder / f"{name}.json" for name in KNOWN if (folder / f"{name}.json").is_file()]
    metafunc.parametrize("path", found or [folder], ids=lambda path: path.stem)


def test_golden(path):
    assert path.is_file(), f"no golden file of a known name in {path}"
    KNOWN[path.stem](json.loads(path.read_text()), path.parent)
