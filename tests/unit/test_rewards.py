"""Rewards behind one interface: mixes, built-in and own rewards, and every mistake in one sentence."""

import pytest
import torch
from tiny_rewards import PROMPTS, SIDE, load, make_images, scores
from transformers import CLIPModel

from brisk import builtin_protocol, handwriting, rewards, scorers
from brisk.options import UserError

pytestmark = pytest.mark.quick


def test_a_mix_is_the_weighted_mean_of_normalised_heads_and_loads_no_other(clip_home, image_reward):
    weights = {"hps": 0, "pickscore": 0.5, "clip": 1, "imagereward": 0.25, "aesthetic": 0.0}
    reward = load("multi", clip_home, weights=weights, imagereward=image_reward[0], weights_path="nowhere.pt", batch_size=2)
    assert reward.heads == ("pickscore", "clip", "imagereward")
    raw = reward.score(make_images(), PROMPTS)
    assert set(raw) == set(reward.heads)
    for head in reward.heads:
        alone = load(head, clip_home, imagereward=image_reward[0], batch_size=1)
        torch.testing.assert_close(raw[head], scores(alone), rtol=1e-5, atol=1e-5)
    offset = 3 * 1.0333394966054072
    expected = (0.5 * (raw["pickscore"] / 26).clamp(0, 1) + raw["clip"].clamp(0, 1)
                + 0.25 * ((raw["imagereward"] + offset) / 10).clamp(0, 1)) / 1.75  # fmt: skip
    torch.testing.assert_close(reward.mixed(raw), expected)


def test_one_published_head_alone_is_normalised_too(clip_home):
    reward = load("pickscore", clip_home)
    torch.testing.assert_close(reward.mixed({"pickscore": torch.tensor([13.0, 30.0])}), torch.tensor([0.5, 1.0]))


# built-in and own rewards


def test_brightness_and_greyness():
    images = torch.stack([torch.full((3, 4, 4), 0.25), torch.cat([torch.ones(1, 4, 4), torch.zeros(2, 4, 4)])])
    dummy, analytic = (rewards.load(rewards.RewardSettings(type=kind)) for kind in ("dummy", "analytic"))
    torch.testing.assert_close(scores(dummy, images, None), torch.tensor([0.25, 1 / 3]))
    torch.testing.assert_close(scores(analytic, images, None), torch.tensor([-0.25, -0.5]) * 3**0.5)
    points = torch.tensor([[0.5, 0.5], [0.8, 0.1]])  # of the plane
    torch.testing.assert_close(scores(analytic, points, None), torch.tensor([0.0, -0.5]))
    assert torch.equal(analytic.mixed({"analytic": torch.tensor([-2.0])}), torch.tensor([-2.0]))


def test_handwriting_is_how_surely_the_oracle_reads_the_caption():
    drawn = handwriting.draw("test", 60, seed=3)
    images, columns = (drawn["images"] + 1) / 2, [drawn[name] for name in ("digits", "foregrounds", "backgrounds")]
    reward = rewards.load(rewards.RewardSettings(type="handwriting", batch_size=16))
    right = reward.score(images, drawn["captions"])
    assert reward.heads == ("handwriting",) and set(right) == {"handwriting", "handwriting_hit"}
    oracle = builtin_protocol.load_oracle()
    chances = [logits.softmax(1)[range(60), column] for logits, column in zip(oracle(drawn["images"]), columns, strict=True)]
    torch.testing.assert_close(right["handwriting"], (chances[0] * chances[1] * chances[2]) ** (1 / 3), rtol=1e-4, atol=1e-6)
    agreement = scorers.prompt_agreement(oracle, drawn["images"], *columns)["all"]
    assert right["handwriting_hit"].mean().item() == pytest.approx(agreement) and agreement > 0.9
    wrong = reward.score(images, drawn["captions"][1:] + drawn["captions"][:1])
    assert wrong["handwriting"].mean() < 0.3 < 0.9 < right["handwriting"].mean()
    assert torch.equal(reward.mixed(right), right["handwriting"])
    digits = reward.score(images, labels=drawn["digits"])
    torch.testing.assert_close(digits["handwriting"], chances[0], rtol=1e-4, atol=1e-6)


OWN = """
import torch
seen = []
def length(images, prompts):
    seen.append((tuple(images.shape), list(prompts)))
    return [float(len(prompt)) for prompt in prompts]
def classes(images, labels):
    return labels * 2
def total(images, prompts):
    return images.mean()
def words(images, prompts):
    return prompts
def nothing(images, prompts):
    return torch.full((len(images),), torch.nan)
number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_reward", raising=False)
    return lambda name: rewards.load(rewards.RewardSettings(type=f"own_reward:{name}"))


def test_an_own_function_gets_batches_of_images_and_prompts(own):
    import own_reward

    reward = own("length")
    found = reward.score(make_images(8, 8), PROMPTS)
    assert found["own_reward:length"].tolist() == [len(prompt) for prompt in PROMPTS]
    assert own_reward.seen == [((2, 3, 8, 8), PROMPTS[:2]), ((1, 3, 8, 8), PROMPTS[2:])]
    assert torch.equal(reward.mixed(found), found["own_reward:length"])
    labels = torch.tensor([4, 0, 7])
    assert own("classes").score(make_images(8, 8), labels=labels)["own_reward:classes"].tolist() == [8, 0, 14]


@pytest.mark.parametrize(
    ("name", "message"),
    [("total", "returned shape () for 2 images"), ("words", "returned a list for 2 images"), ("nothing", "no finite number")],
)
def test_an_own_function_must_give_one_finite_number_per_image(own, name, message):
    with pytest.raises(UserError) as error:
        own(name).score(make_images(8, 8), PROMPTS)
    assert message in str(error.value)


class Program:
    """Would run on an unsafe load."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_every_mistake_is_one_sentence_at_start_up(clip_home, tmp_path, own, mps, image_reward):
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(Program(), tmp_path / "program.pt")
    torch.save({"state_dict": {"visual.proj": torch.ones(2, 2)}}, tmp_path / "other.pt")
    (tmp_path / "half").mkdir()
    CLIPModel.from_pretrained(clip_home).text_model.save_pretrained(tmp_path / "half")
    place = {name: str(tmp_path / name) for name in ("empty.pt", "program.pt", "other.pt", "half", "none.pt")}
    linear = {"clip_path": str(clip_home)}
    cases = [
        ({"type": "hsp"}, ("reward.type is hsp", "hps, pickscore", "module:function")),
        ({"type": "multi", "weights": {"hps": 0}}, ("reward.multi.weights", "above 0")),
        ({"type": "multi", "weights": {"mps": 1}}, ("reward.multi.weights.mps", "hps, pickscore")),
        ({"weights_path": place["none.pt"]}, ("reward.weights_path", "none.pt", "no such file", "HPS_v2.1_compressed.pt")),
        ({"weights_path": place["none.pt"], "hps_version": "v2.0"}, ("HPS_v2_compressed.pt of huggingface.co/xswu/HPSv2",)),
        ({"hps_version": "v3"}, ("reward.hps_version is v3", "v2.1, v2.0")),
        ({}, ("reward.weights_path is not given", "huggingface.co/xswu/HPSv2")),
        ({"weights_path": place["empty.pt"]}, ("empty.pt", "damaged, or a program")),
        ({"weights_path": place["program.pt"]}, ("program.pt", "damaged, or a program")),
        ({"weights_path": place["other.pt"]}, ("other.pt", "lacks weights", "HPS_v2.1_compressed.pt")),
        ({"weights_path": place["other.pt"], "pickscore": {"processor": place["half"] + "/x"}},
         ("reward.multi.pickscore.processor", "no CLIPConfig")),
        ({"type": "pickscore", "pickscore": {"model": place["none.pt"]}}, ("reward.multi.pickscore.model", "no CLIPModel")),
        ({"type": "pickscore", "pickscore": {"model": str(clip_home), "processor": place["half"]}},
         ("reward.multi.pickscore.processor", "half has", "tokens")),
        ({"type": "clip", "clip": {"model": place["half"]}}, ("reward.multi.clip.model", "half")),
        ({"type": "aesthetic"}, ("reward.multi.aesthetic.predictor_path is not given", "improved-aesthetic-predictor")),
        ({"type": "aesthetic", "aesthetic": {**linear, "predictor_path": place["other.pt"]}}, ("predictor_path", "lacks weights")),
        ({"type": "imagereward"}, ("reward.multi.imagereward.checkpoint is not given", "THUDM/ImageReward")),
        ({"type": "imagereward", "imagereward": {**image_reward[0], "med_config": place["none.pt"]}}, ("med_config", "none.pt")),
        ({"type": "imagereward", "imagereward": {**image_reward[0], "tokenizer": place["half"]}}, ("imagereward.tokenizer",)),
        ({"type": "imagereward", "imagereward": {**image_reward[0], "checkpoint": place["other.pt"]}},
         ("imagereward.checkpoint", "lacks", "ImageReward.pt")),
        ({"type": "mps"}, ("reward.multi.mps.checkpoint is not given", "MPS_overall_checkpoint_diffsynth.safetensors")),
        ({"type": "mps", "mps": {**mps[0], "checkpoint": place["program.pt"]}}, ("never executed", "damaged, or a program")),
        ({"type": "mps", "mps": {**mps[0], "checkpoint": place["other.pt"]}}, ("reward.multi.mps.checkpoint", "lacks weights")),
        ({"type": "own_reward:missing"}, ("own_reward:missing", "imported")),
        ({"type": "no_such_module:f"}, ("no_such_module", "imported")),
        ({"type": "own_reward:number"}, ("own_reward:number", "int")),
    ]  # fmt: skip
    for changes, parts in cases:
        settings = rewards.RewardSettings(**{"pickscore": {"model": str(clip_home), "processor": str(clip_home)}, **changes})
        with pytest.raises(UserError) as error:
            rewards.load(settings)
        assert all(part in str(error.value) for part in parts), (changes, str(error.value))
        assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_what_a_head_cannot_score_is_one_sentence(clip_home):
    clip, oracle = load("clip", clip_home), rewards.load(rewards.RewardSettings(type="handwriting"))
    images = make_images(SIDE, SIDE)
    for reward, given, message in [
        (clip, (images, None), "clip scores images of prompts"), (clip, (torch.rand(2, 2), PROMPTS[:2]), "RGB images"),
        (oracle, (make_images(), PROMPTS), "(3, 32, 32)"), (oracle, (images, PROMPTS), "does not read"),
        (oracle, (images,), "captions or classes"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
            reward.score(*given)
