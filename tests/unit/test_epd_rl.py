"""Parts of tuning by rewards: options and what predictors say over them, what an update draws, folders, frozen factors, scores."""

import datetime
from types import SimpleNamespace

import pytest
import random_predictor
import torch

import train_epd_rl
from brisk import denoisers, epd, epd_policy, epd_rl, epd_rl_options, predictor, rewards
from brisk.options import UserError

pytestmark = pytest.mark.quick
MOMENT = datetime.datetime(2030, 1, 2, 3, 4, 5)


def parse(*flags):
    return train_epd_rl.parse_args(list(flags))


def overridden(*texts):
    return parse(*(f"--override={text}" for text in texts))


def test_overrides_are_read_as_their_key_demands():
    args, _, settings, stated = overridden(
        "ppo.rloo_k=0x4", "ppo.kl_coef=1e-3", "ppo.decode_rgb=false", "ppo.max_grad_norm=null", "data.prompt_csv=007",
        "run.seed=0x10", "ppo.steps=7", "ppo.train_scale_dir=true", "model.backend_options.model_id=some/model",
    )  # fmt: skip
    assert (settings["ppo.rloo_k"], settings["ppo.kl_coef"], settings["ppo.decode_rgb"]) == (4, 0.001, False)
    assert settings["ppo.max_grad_norm"] is None and settings["data.prompt_csv"] == "007"
    assert settings["ppo.train_scale_dir"] is True
    assert (args.seed, args.max_train_steps) == (16, 7) and "ppo.rloo_k" in stated and "ppo.clip_range" not in stated
    assert settings["model.backend_options.model_name_or_path"] == "some/model"


def test_flags_go_before_overrides_and_overrides_before_the_file(tmp_path):
    content = "run: {seed: 1, run_name: a}\nppo: {steps: 5, rloo_k: 4}\neval_every: 9\nmixed_precision: no\n"
    (tmp_path / "own.yaml").write_text(content)
    flags = (f"--config={tmp_path / 'own.yaml'}", "--override", "ppo.steps=6", "--override=run.run_name=b", "--run-name=c")
    args, given, settings, _ = parse(*flags)
    assert (args.seed, args.run_name, args.max_train_steps, args.eval_every, args.mixed_precision) == (1, "c", 6, 9, "no")
    assert settings["ppo.rloo_k"] == 4 and {"seed", "run_name", "max_train_steps", "eval_every"} <= given


def test_empty_sections_and_nulls_leave_the_defaults(tmp_path):
    (tmp_path / "own.yaml").write_text("model:\n  backend_options: {}\n  num_steps: null\nreward:\n")
    _, _, settings, _ = parse(f"--config={tmp_path / 'own.yaml'}")
    assert settings == parse()[2]


def test_the_section_reward_is_the_one_that_rewards_know():
    found = epd_rl_options.reward_settings(overridden("reward.type=multi", "reward.multi.weights.hps=0.5")[2])
    assert found.type == "multi" and found.weights == dict.fromkeys(epd_policy.REWARD_SCALES, 1.0) | {"hps": 0.5}
    for head, section in rewards.SECTIONS.items():
        assert set(getattr(found, head)) <= {*section, "cache_dir"} and set(section) <= set(getattr(found, head)), head
    assert epd_rl_options.reward_settings(parse()[2])._replace(weights={}, **dict.fromkeys(rewards.SECTIONS, {})) == \
        rewards.RewardSettings()  # fmt: skip


def merged(*texts, prefer=False, **model):
    _, _, settings, stated = overridden(*texts)
    content = random_predictor.make_predictor(**{"guidance_type": "cfg", "guidance_rate": 2.0, "backend": "sd"} | model)
    return epd_rl_options.merge_model(settings, stated, content, prefer)


def test_what_a_predictor_says_goes_before_the_file_and_each_change_is_told():
    settings, sentences, others = merged("model.guidance_rate=7.5", "model.resolution=64", "model.schedule_type=polynomial")
    assert (settings["model.guidance_rate"], settings["model.resolution"], settings["model.schedule_type"]) == (2.0, 32, "discrete")
    assert len(sentences) == 3 and all("gives way to the predictor's" in text for text in sentences) and not others
    assert settings["model.num_steps"] == 5 and settings["model.dataset_name"] == "own" and settings["model.backend"] == "sd"


def test_prefer_yaml_reverses_this_for_what_is_stated_alone():
    settings, sentences, others = merged("model.guidance_rate=7.5", "model.schedule_type=polynomial", prefer=True)
    assert (settings["model.guidance_rate"], settings["model.schedule_type"]) == (7.5, "polynomial") and others
    assert settings["model.guidance_type"] == "cfg" and settings["model.resolution"] == 32
    assert all("in place of the predictor's" in text for text in sentences) and len(sentences) == 2


def test_no_guidance_is_something_that_a_predictor_says():
    assert merged(guidance_type=None, guidance_rate=None)[0]["model.guidance_type"] is None
    assert merged("model.guidance_type=null", prefer=True)[0]["model.guidance_type"] is None


def test_the_place_of_the_model_is_the_stated_one():
    config = {"model_name_or_path": "theirs", "revision": "main"}
    assert merged(backend_config=config)[0]["model.backend_options.model_name_or_path"] == "theirs"
    settings, sentences, _ = merged("model.backend_options.model_name_or_path=ours", backend_config=config)
    assert settings["model.backend_options.model_name_or_path"] == "ours" and not sentences
    assert settings["model.backend_options.revision"] == "main"


def test_where_nobody_says_which_model_it_is_it_is_that_of_the_data_set():
    settings = merged(dataset=None, backend=None)[0]
    assert (settings["model.dataset_name"], settings["model.backend"]) == ("ms_coco", None)
    settings = merged("model.backend_options.model_name_or_path=x", dataset=None, backend=None)[0]
    assert (settings["model.dataset_name"], settings["model.backend"]) == (None, None)
    with pytest.raises(UserError, match="model.num_points is 3, the predictor's tables have 2"):
        merged("model.num_points=3", prefer=True)


def batches(prompts, *, takes="prompts", shared=True, update=0, rows=(0, 8), seed=1, count=1):
    denoiser = SimpleNamespace(takes=takes, shape=(2, 3), device=torch.device("cpu"), classes=50)
    stream = epd_rl.draw_batches(denoiser, prompts, 8, 4, shared, seed, update, rows)
    return [next(stream) for _ in range(count)]


def test_images_of_a_prompt_share_a_latent_and_others_do_not():
    (noise, given), = batches(list("abcdefgh"))
    assert given[:4] == given[:1] * 4 and given[4:] == given[4:5] * 4 and given[0] != given[4]
    assert all(noise[row].equal(noise[row - row % 4]) for row in range(8)) and not noise[0].equal(noise[4])
    (noise, _), = batches(list("abcdefgh"), shared=False)
    assert len({tuple(row) for row in noise.flatten(1).tolist()}) == 8


def test_draws_depend_on_seed_and_update_but_not_on_the_process_or_on_earlier_updates():
    prompts = list("abcdefg")
    unbroken = batches(prompts, count=4)
    (noise, given), = batches(prompts, update=3)
    assert noise.equal(unbroken[3][0]) and given == unbroken[3][1]
    halves = [batches(prompts, update=3, rows=rows)[0] for rows in ((0, 3), (3, 8))]
    assert torch.cat([half[0] for half in halves]).equal(noise) and halves[0][1] + halves[1][1] == given
    assert not batches(prompts, seed=2, update=3)[0][0].equal(noise)
    assert len({tuple(noise.flatten().tolist()) for noise, _ in unbroken}) == 4


def test_every_prompt_comes_once_per_pass():
    given = [text for _, texts in batches(list("abcdef"), count=6) for text in texts[::4]]
    assert sorted(given[:6]) == sorted(given[6:]) == list("abcdef") and given[:6] != given[6:]


def test_a_group_has_one_class_and_a_model_without_conditions_gets_none():
    (_, labels), = batches(None, takes="classes")
    assert labels.shape == (8,) and labels[:4].unique().numel() == labels[4:].unique().numel() == 1
    assert batches(None, takes=None)[0][1] is None


def test_prompts_to_evaluate_on_are_held_out():
    prompts = [str(number) for number in range(30)]
    rest, held = epd_rl.hold_out(prompts, 4)
    assert len(held) == 4 and not set(rest) & set(held) and set(rest) | set(held) == set(prompts)
    assert (rest, held) == epd_rl.hold_out(prompts, 4) and len(epd_rl.hold_out(prompts, 99)[1]) == 6
    assert epd_rl.hold_out(["a", "b"], 4) == (["a", "b"], ["a", "b"])


def test_minibatches_cover_the_rollout_in_each_pass():
    parts = list(epd_rl.minibatches(10, 4, 2, 7, "minibatches"))
    assert [len(part) for part in parts] == [4, 4, 2] * 2
    first, second = torch.cat(parts[:3]), torch.cat(parts[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10)) and not first.equal(second)


def test_folders_have_a_number_where_the_name_is_taken_and_a_resume_finds_the_newest(tmp_path):
    def choose(name="run", resume=False):
        path = epd_rl.choose_folder(tmp_path, name, resume, MOMENT)
        return path.name

    assert choose() == choose(resume=True) == "20300102-030405-run"
    for taken in ("20300102-030405-run", "20300102-030405-run-01", "20310101-000000-run-other"):
        (tmp_path / taken / "checkpoint-1").mkdir(parents=True)
    assert choose() == "20300102-030405-run-02" and choose(resume=True) == "20300102-030405-run-01"
    assert choose("run-other", True) == "20310101-000000-run-other"


def content_of(*ranges):
    solver = predictor.Solver("epd", 3, 2, True, None, True)
    raw = epd.initial_raw(2, 2, "normal", torch.Generator().manual_seed(0))
    schedule = {"type": "polynomial", "rho": 7.0, "sigma_min": 0.1, "sigma_max": 9.0, "sigmas": [9.0, 1.0, 0.1]}
    return predictor.make("own", "distilled", solver, schedule, {"guidance_type": None}, raw=predictor.Raw(*raw, *ranges))


def test_factors_are_learned_where_the_predictor_has_them_unless_told():
    content = content_of(0.0, 0.3)
    assert epd_rl.learns_scales(content, (None, None)) == (False, True)
    assert epd_rl.learns_scales(content._replace(raw=None), (None, None)) == (False, True)
    assert epd_rl.learns_scales(content, (True, False)) == (True, False)


def test_frozen_factors_and_their_points_stay_together_where_tables_are_sorted():
    content = content_of(0.2, 0.3)
    tables = epd.Tables(*(table.flip(-1) for table in content.tables)) if content.tables.r[0].diff() > 0 else content.tables
    assert (tables.r.diff(dim=-1) < 0).any(), "nothing to sort proves nothing"
    base = epd_policy.base_factors(tables, 10.0)
    policy = epd_rl.make_policy(tables, base, 0.0, 0)
    found, rows = epd_rl.mean_tables(policy)
    order = tables.r.argsort(-1)
    for table, expected in zip(found, tables, strict=True):
        torch.testing.assert_close(table, expected.gather(-1, order))
    assert rows == [] and epd_rl.divergence(policy) == pytest.approx(0, abs=1e-9)
    result = epd_rl.with_tables(content, "new", "rl", found, {"step": 1})
    torch.testing.assert_close(result.tables.scale_time, found.scale_time, atol=1e-6, rtol=0)
    assert result.document["stage"] == "rl" and result.document["training"] == {"step": 1}


def test_what_an_evaluation_says():
    start, mixed = torch.tensor([1.0, 2.0, 3.0, 6.0]).double(), torch.tensor([2.0, 2.5, 4.0, 6.5]).double()
    found = epd_rl.judge({"clip": mixed / 10}, mixed, start)
    assert found["reward"] == 3.75 and found["gain"] == 0.75 and found["clip_mean"] == pytest.approx(0.375)
    assert found["standard_error"] == pytest.approx(mixed.std().item() / 2)
    assert found["gain_standard_error"] == pytest.approx((mixed - start).std().item() / 2)
    assert epd_rl.standard_error(mixed[:1]) == 0


def test_rewards_see_decoded_images_in_their_range_a_few_at_a_time():
    seen = []

    class Reward:
        def score(self, images, prompts, labels):
            seen.append((images, prompts, labels))
            return {"mean": images.flatten(1).mean(1)}

    denoiser = denoisers.Denoiser("own", None, None, None, lambda x0: 3 * x0, (3, 2, 2), 2, 0.1, 1.0)
    states = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 2, 2)
    found = epd_rl.score(Reward(), denoiser, states, list("abcde"), 2)
    assert found["mean"].tolist() == pytest.approx([0, 0, 0.5, 1, 1]) and [len(each[0]) for each in seen] == [2, 2, 1]
    assert [each[1:] for each in seen] == [(["a", "b"], None), (["c", "d"], None), (["e"], None)]
    labels = torch.arange(5)
    assert epd_rl.score(Reward(), denoiser, states, labels, 5, False)["mean"].tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert seen[-1][1] is None and seen[-1][2].equal(labels)
