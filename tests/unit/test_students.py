"""Students: chosen by name or file, checked before any work, created from their teacher, reported."""

import hashlib
import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from brisk import bksdm, sd_models, students, tiny
from brisk.options import UserError

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return tiny.make_unet("toy").requires_grad_(False).eval()


@pytest.fixture(scope="module")
def config(teacher):
    return sd_models.plain_config(teacher)


@pytest.fixture(scope="module")
def small(config):
    """The plan of the preset bk_small."""
    return plan_of(config, "bk_small")


def plan_of(config, preset="bk_small", feature_set=None, **changes):
    name, derived = students.choose_config(config, preset)
    return students.make_plan(config, name, {**derived, **changes}, 8, feature_set)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def refused(call, *args, **named):
    """The sentence of the UserError."""
    with pytest.raises(UserError) as caught:
        call(*args, **named)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


# configs


def test_presets_are_chosen_by_name_or_alias(config):
    assert students.choose_config(config, "sd_small") == ("bk_base", bksdm.derive_student_config(config, "bk_base"))
    for preset, words in (("tiny_sd_xl", "--preset tiny_sd_xl: the preset"), ("nonsense", "'nonsense' is none of bk_base")):
        assert words in refused(students.choose_config, config, preset)
    with torch.device("meta"):
        xl = sd_models.plain_config(tiny.make_unet("toy_xl"))
    assert "tiny_sd_xl, koala_1b, koala_700m" in refused(students.choose_config, xl, "bk_tiny")


def test_configs_of_the_users_own_are_laid_over_the_teachers(config, tmp_path):
    own = {"layers_per_block": 1, "mid_block_type": None, "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.1"}
    file = write(tmp_path / "own.json", own)
    write(tmp_path / "folder/mine/config.json", own)
    expected = (None, {**config, "layers_per_block": 1, "mid_block_type": None})
    assert students.choose_config(config, "bk_base", file=file) == expected
    assert students.choose_config(config, "mine", folder=str(tmp_path / "folder")) == expected
    assert expected[1] == bksdm.derive_student_config(config, "bk_small")


@pytest.mark.parametrize(("content", "words"), [
    (None, "--student_config {} cannot be read as JSON"), ("{'a': 1}", "cannot be read as JSON"), ([1], "must hold the config"),
])  # fmt: skip
def test_unreadable_configs_are_refused(content, words, config, tmp_path):
    file = write(tmp_path / "own.json", content) if content is not None else str(tmp_path / "none.json")
    assert words.format(file) in refused(students.choose_config, config, "bk_small", file=file)
    if content is None:
        message = refused(students.choose_config, config, "bk_small", folder=str(tmp_path))
        assert f"--unet_config_path {tmp_path}/bk_small/config.json cannot be read" in message


def test_a_config_that_makes_no_network_is_refused(config):
    message = refused(students.make_plan, config, None, {**config, "block_out_channels": [8, 16]}, 8)
    assert message.startswith("the student's config makes no U-Net: ")


# plans


def test_a_plan_holds_what_fits(small, config, teacher):
    assert small.preset == "bk_small" and small.config["mid_block_type"] is None and len(small.pairs) == 8
    assert small.sizes[0].parameters == sum(p.numel() for p in teacher.parameters()) == sum(small.teacher_numels.values())
    assert small.sizes[1].parameters == sum(small.teacher_numels[source] for source in small.mapping.values())
    assert small.sizes[1].total < small.sizes[0].total


@pytest.mark.parametrize(("changes", "words"), [
    ({"block_out_channels": (8, 8, 24, 24)}, ["cannot come from this teacher", "(24,", "mid", "down_blocks.2", "up_blocks.1"]),
    ({"layers_per_block": 3}, ["the teacher has no down_blocks.0.resnets.2.conv1.weight"]),
])  # fmt: skip
def test_all_weights_that_do_not_fit_are_one_error(changes, words, config):
    student = {**config, **changes}
    message = refused(students.make_plan, config, None, student, 8)
    assert all(word in message for word in words), message
    count = int(message.split()[0])
    assert count > 10 and message.count(";") == count - 1


@pytest.mark.parametrize(("changes", "words"), [
    ({"cross_attention_dim": 48}, "cross_attention_dim 48, the teacher's is 32."),
    ({"in_channels": 9, "out_channels": 8}, "in_channels 9, the teacher's is 4; out_channels 8, the teacher's is 4."),
    ({"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80},
     "it has addition_embed_type text_time, the teacher's is None"),
    ({"block_out_channels": (8, 8, 16, 16, 16), "down_block_types": ("DownBlock2D",) * 5, "up_block_types": ("UpBlock2D",) * 5},
     "it has 5 levels, the teacher has 4"),
    ({"time_cond_proj_dim": 16}, "time_cond_proj_dim 16, the teacher's is None."),
])  # fmt: skip
def test_a_student_that_is_called_otherwise_is_refused_even_with_weights_of_its_own(changes, words, config):
    message = refused(students.make_plan, config, None, {**config, **changes}, 8, None, False)
    assert message.startswith("the student does not fit this teacher: ") and words in message


def test_identity_changes_with_the_config_and_the_features_and_with_nothing_else(small, config):
    same = small._replace(config=json.loads(json.dumps(small.config)), sizes=None, mapping=None)
    assert same.identity() == small.identity()
    other = small._replace(pairs=bksdm.feature_pairs("stage", small.mapping, small.config, config))
    assert other.identity()["student"] == small.identity()["student"]
    assert len(other.pairs) == len(small.pairs) and other.identity()["features"] != small.identity()["features"]
    own = small._replace(preset=None, config={**small.config, "dropout": 0.1})
    assert own.identity()["student"] != small.identity()["student"] and own.identity()["features"] == small.identity()["features"]
    assert small.identity()["student"].startswith("bk_small #") and own.identity()["student"].startswith("own config #")


def test_lines_give_both_sizes_and_on_request_the_removal_table(small):
    table, sizes = small.describe(with_table=True), small.describe(with_table=False)
    assert table[-3:] == sizes and table[0].startswith("teacher module") and len(table) > 40
    teacher, student = small.sizes
    assert "bk_small" in sizes[0] and sizes[1].startswith(f"teacher: {teacher.parameters:,} parameters, ")
    assert f"student: {student.parameters:,} parameters ({student.parameters / teacher.parameters - 1:+.1%}), " in sizes[2]
    assert f"{student.total:,} MACs" in sizes[2] and f"{student.published:,} as papers count" in sizes[2]


def test_the_table_leaves_out_what_the_student_alone_has(config):
    plan = students.make_plan(config, None, {**config, "layers_per_block": 3}, 8, None, False)
    rows = bksdm.removal_table(plan.mapping, plan.teacher_numels)
    assert sum(kept for _, _, kept, _ in rows) == sum(plan.teacher_numels.get(name, 0) for name in plan.mapping.values())
    assert len(plan.describe(with_table=True)) == len(rows) + 4


# feature sets


def test_a_file_of_pairs_replaces_the_preset(config, tmp_path):
    pairs = [["mid_block", "down_blocks.3"], ["up_blocks.0.resnets.2", "up_blocks.0.resnets.1"]]
    plan = plan_of(config, "bk_small", write(tmp_path / "pairs.json", pairs))
    assert plan.pairs == [tuple(pair) for pair in pairs]


NOT_PAIRS, NO_MODULE = "must hold a list of [teacher module, student module] pairs", "the U-Net has no module"
BAD_PAIRS = {
    "not JSON": ("{", "pairs.json cannot be read as JSON"), "empty": ([], NOT_PAIRS), "no list": ({"a": "b"}, NOT_PAIRS),
    "three names": ([["a", "b", "c"]], NOT_PAIRS), "numbers": ([["mid_block", 1]], NOT_PAIRS),
    "strings": (["mid_block"], NOT_PAIRS),
    "unknown modules": ([["mid_blok", "mid"], ["up_blocks.9", "up_blocks.0"]], f"teacher: {NO_MODULE} mid_blok, up_blocks.9."),
    "of the teacher alone": ([["mid_block", "mid_block"]], f"student: {NO_MODULE} mid_block."),
    "never called": ([["up_blocks", "up_blocks"]], "teacher: a trial call failed: no output of up_blocks was seen"),
    "unequal": ([["mid_block", "up_blocks.3"], ["conv_in", "down_blocks.1"]],
                "mid_block (1, 16, 1, 1) and up_blocks.3 (1, 8, 8, 8); conv_in (1, 8, 8, 8) and down_blocks.1 (1, 8, 2, 2)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_bad_files_of_pairs_are_refused(kind, config, tmp_path):
    content, words = BAD_PAIRS[kind]
    assert words in refused(plan_of, config, "bk_small", write(tmp_path / "pairs.json", content))


def test_unknown_feature_sets_are_refused(config, tmp_path):
    assert "--feature_set stages is none of bk, stage, layer, self_attn and no JSON file" in refused(
        plan_of, config, "bk_small", "stages"
    )
    assert "cannot be read" in refused(plan_of, config, "bk_small", str(tmp_path / "none.json"))


# networks


def test_the_student_starts_as_a_float32_copy_of_its_own(small, teacher):
    half = UNet2DConditionModel.from_config(teacher.config)
    half.load_state_dict(teacher.state_dict())
    student = students.create(small, half.half())
    its = half.state_dict()
    for name, value in student.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, its[small.mapping[name]].float()), name
    assert all(p.requires_grad and p.device.type == "cpu" for p in student.parameters())
    assert "null" in student.to_json_string().split('"mid_block_type":')[1][:6]


def test_training_the_student_leaves_the_teacher_alone(small, teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = students.create(small, teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_random_students_share_no_weight_with_the_teacher(small, teacher):
    torch.manual_seed(5)
    student, its = students.create(small, teacher, copies_weights=False), teacher.state_dict()
    assert all(p.requires_grad for p in student.parameters())
    wide = [name for name, value in student.state_dict().items() if value.ndim > 1]
    assert not any(torch.equal(student.state_dict()[name], its[small.mapping[name]]) for name in wide)


@pytest.mark.parametrize("way", ["copied", "random", "loaded"])
def test_a_projection_that_is_never_called_is_not_trained(way, tmp_path):
    teacher = tiny.make_unet("toy", time_cond_proj_dim=16)
    plan = plan_of(sd_models.plain_config(teacher))
    student = students.create(plan, teacher, way == "copied")
    if way == "loaded":
        student.save_pretrained(tmp_path)
        student, _ = students.load(str(tmp_path))
    frozen = [name for name, value in student.named_parameters() if not value.requires_grad]
    assert frozen == ["time_embedding.cond_proj.weight"]


@pytest.mark.parametrize("place", ["root", "unet"])
def test_a_saved_student_is_loaded_trainable_with_its_config(place, small, teacher, tmp_path):
    student = students.create(small, teacher)
    student.save_pretrained(tmp_path / ("" if place == "root" else "unet"))
    loaded, config = students.load(str(tmp_path))
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert all(p.requires_grad for p in loaded.parameters()) and config["mid_block_type"] is None
    assert json.dumps(config, sort_keys=True) == json.dumps(small.config, sort_keys=True)
    assert "cannot be loaded" in refused(students.load, str(tmp_path / "none"))


def test_the_report_tells_sizes_and_where_the_weights_came_from(small):
    report = json.loads(json.dumps(students.report(small, True, {"loss": float("nan"), "step": 3})))
    lines = "\n".join(f"{key}\t{small.mapping[key]}" for key in sorted(small.mapping))
    assert report["weight_map_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert report["weight_map_entries"] == len(small.mapping) and report["preset"] == "bk_small"
    assert report["last"] == {"loss": None, "step": 3}
    assert report["feature_pairs"] == [list(pair) for pair in small.pairs]
    for name, size in zip(("teacher", "student"), small.sizes, strict=True):
        assert report[name]["parameters"] == size.parameters
        assert (report[name]["macs_total"], report[name]["macs_published"]) == (size.total, size.published)
