"""Bad input of train_epd_rl.py: one sentence and exit code 2, before any update, and nothing left behind."""

import pytest
from conftest import ROOT
from epd_rl_runs import SCRIPT, flags, pipeline_start, run, start_file
from inprocess import train

from brisk import epd_rl_options
from brisk.options import UserError

TEACHER = ROOT / "assets/tiny-teacher"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return start_file(tmp_path_factory.mktemp("start"))


@pytest.fixture
def refused(start, tmp_path):
    """A function: flags -> the message of the UserError with which the run is refused; nothing was written."""

    def go(*more, start=start, exit_code=2):
        output = tmp_path / "out"
        with pytest.raises(UserError) as caught:
            run(output, start, *more)
        message = str(caught.value)
        assert caught.value.exit_code == exit_code
        assert message and "\n" not in message and "Traceback" not in message and len(message) < 600
        assert not output.exists(), "a refused run leaves no folder behind"
        return message

    return go


BAD = {
    "unknown key": (["ppo.rollout_batchsize=4"], ["--override has an unknown key 'ppo.rollout_batchsize'",
                                                  "the nearest one is ppo.rollout_batch_size"]),
    "unknown section": (["rewards.type=hps"], ["unknown key 'rewards.type'", "reward.type"]),
    "no value": (["ppo.rloo_k"], ["--override ppo.rloo_k is not of the form KEY=VALUE"]),
    "no number": (["ppo.rloo_k=four"], ["ppo.rloo_k", "'four' is not a whole number"]),
    "null": (["ppo.rloo_k=null"], ["ppo.rloo_k cannot be null", "default is 2"]),
    "no boolean": (["ppo.decode_rgb=maybe"], ["ppo.decode_rgb", "neither True nor False"]),
    "groups": (["ppo.rloo_k=3"], ["ppo.rollout_batch_size 8", "ppo.rloo_k 3"]),
    "minibatch": (["ppo.minibatch_size=9"], ["ppo.minibatch_size 9", "ppo.rollout_batch_size 8"]),
    "reward batch": (["reward.batch_size=9"], ["reward.batch_size 9", "ppo.rollout_batch_size 8"]),
    "no steps": (["ppo.steps=0"], ["--override: ppo.steps: 0 is", "at least 1"]),
    "no spread": (["ppo.scale_std=0"], ["ppo.scale_std", "greater than 0"]),
    "resolution of sd3": (["model.backend=sd3", "model.resolution=768"], ["model.resolution is 768", "sd3 takes 512 or 1024"]),
    "resolution of flux": (["model.backend=flux", "model.resolution=512"], ["model.resolution is 512", "flux takes 1024"]),
    "schedule of flux": (["model.backend=flux", "model.schedule_type=discrete"], ["discrete", "flux takes flowmatch"]),
    "guidance of flux": (["model.backend=flux", "model.guidance_type=uncond"], ["uncond", "flux takes cfg"]),
    "no weights": (["reward.type=multi", "ppo.decode_rgb=true",
                    *(f"reward.multi.weights.{head}=0" for head in ("hps", "pickscore", "imagereward", "clip", "aesthetic"))],
                   ["reward.multi.weights are all 0"]),
    "undecoded": (["reward.type=clip"], ["ppo.decode_rgb is false", "reward.type clip"]),
    "unknown reward": (["reward.type=fid", "ppo.decode_rgb=true"], ["reward.type is fid"]),
    "reward that cannot be imported": (["reward.type=nowhere:score"], ["reward.type nowhere:score"]),
    "missing weights": (["reward.type=aesthetic", "ppo.decode_rgb=true"], ["reward.multi.aesthetic.predictor_path is not given"]),
    "no such predictor": (["data.predictor_snapshot=nowhere.json"], ["data.predictor_snapshot nowhere.json"]),
    "no predictor": (["data.predictor_snapshot=null"], ["data.predictor_snapshot is missing"]),
    "another number of levels": (["model.num_steps=7", "--prefer_yaml"], ["model.num_steps is 7", "tables have 4"]),
    "levels that do not fit": (["model.schedule_type=discrete", "--prefer_yaml"], ["model.schedule_type discrete"]),
    "guidance without a rate": (["model.guidance_type=cfg", "--prefer_yaml"], ["guidance_type is cfg", "model.guidance_rate"]),
    "classifier guidance": (["model.guidance_type=cg", "model.guidance_rate=1", "--prefer_yaml"], ["model.guidance_type cg"]),
    "no such model": (["model.backend_options.gmm_file=nowhere.json"], ["model.backend_options.gmm_file nowhere.json"]),
    "two models": (["model.backend_options.model_name_or_path=nowhere"],
                   ["model.backend_options.gmm_file and model.backend_options.model_name_or_path are two models"]),
    "no such checkpoint, by override": (["resume_from_checkpoint=nowhere"], ["--override: resume_from_checkpoint nowhere is"]),
    "no such checkpoint": (["--resume=nowhere"], ["nowhere"]),
    "unknown grouping": (["--rloo_group=batch"], ["--rloo_group", "prompt", "mixed"]),
    "tracker": (["--report_to=paper"], ["--report_to paper"]),
    "unknown flag": (["--max_step=4"], ["--max_step", "--max_steps"]),
    "levels of a model that the predictor does not state": (["model.flowmatch_mu=0.7", "model.schedule_type=flowmatch",
                                                             "--prefer_yaml"], ["model.schedule_type flowmatch"]),
    "reward of another shape": (["reward.type=operator:is_"], ["reward.type operator:is_"]),
    "no run to export": (["--export=nowhere"], ["--export nowhere", "configs/start.json"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_in_one_sentence(case, refused):
    more, words = BAD[case]
    message = refused(*more)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("content", "words"), [
    ("ppo: [1, 2]", ["'ppo' must be a single value"]), ("- a\n- b\n", ["must hold sections"]),
    ("a: b: c", ["cannot be read as YAML"]),
    ("ppo:\n  rlook: 3\n", ["unknown key 'ppo.rlook'", "the nearest one is ppo.rloo_k"]),
    ("ppo:\n  steps: x\n", ["own.yaml: ppo.steps: 'x' is not a whole number."]), ("rloo_group: all\n", ["own.yaml: rloo_group: "]),
    ("ppo:\n  rloo_k: {a: 1}\n", ["unknown key 'ppo.rloo_k.a'"]), ("max_stepz: 3\n", ["unknown key 'max_stepz'", "max_steps"]),
])  # fmt: skip
def test_files_of_options_that_cannot_be_used(content, words, start, tmp_path):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        train(tmp_path / "out", f"--config={tmp_path / 'own.yaml'}", script=SCRIPT)
    assert all(word in str(caught.value) for word in ["--config", "own.yaml", *words]), str(caught.value)


@pytest.mark.parametrize(("more", "words"), [
    ((), ["give data.prompt_csv"]), (("data.prompt_csv=nowhere.csv",), ["data.prompt_csv nowhere.csv", "No such file"]),
    (("data.prompt_csv={}/empty.txt",), ["data.prompt_csv", "holds no prompt"]),
    (("data.prompt_csv={}/one.txt", "--eval_prompts={}/none.txt"), ["--eval_prompts", "none.txt"]),
])  # fmt: skip
def test_prompts_that_cannot_be_used(more, words, refused, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "one.txt").write_text("a red fox\n")
    start = pipeline_start(tmp_path, "sd", TEACHER, flow=False)
    message = refused(*(text.format(tmp_path) for text in more), start=start)
    assert all(word in message for word in words), message


def score_nothing(images, prompts):
    return images.flatten(1).mean(1) * float("nan")


def test_a_reward_that_is_no_number_stops_the_run_with_exit_code_1(start, tmp_path):
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out", start, f"reward.type={__name__}:score_nothing")
    assert caught.value.exit_code == 1 and "no finite number" in str(caught.value)
    assert not (tmp_path / "out/export").exists()


def test_flags_without_effect_are_named(start, tmp_path):
    done = run(tmp_path / "out", start, "--eval_prompts=x.txt", "--run_name=x", "--export_point=mode", "ppo.rloo_k=1",
               "--rloo_group=mixed", "--hub_model_id=x", "--eval_samples=3",
               "model.backend_options.enable_model_cpu_offload=true")  # fmt: skip
    named = {line.split("--")[1].split()[0] for line in done.log.splitlines() if "has no effect without" in line}
    assert named == {"eval_prompts", "run_name", "export_point", "rloo_group", "hub_model_id", "eval_samples"}
    assert "enable_model_cpu_offload has no effect" in done.log


def test_warnings_name_the_keys_of_a_file_but_flags_that_win_over_it(start, tmp_path):
    place = tmp_path / "own.yaml"
    place.write_text("run:\n  run_name: x\neval_samples: 3\nhub_model_id: x\nrloo_group: mixed\n")
    done = run(tmp_path / "out", start, f"--config={place}", "--eval_samples=5")
    warned = [line.split(" WARNING ")[1] for line in done.log.splitlines() if "has no effect" in line]
    assert warned == [
        "--eval_samples has no effect without --eval_every above 0.",
        f"--config {place}: run.run_name has no effect without a folder of its own (--nosubdir is set).",
        f"--config {place}: hub_model_id has no effect without --push_to_hub.",
    ]
    assert "the checkpoint had" not in done.log
    again = run(tmp_path / "out", start, f"--config={place}", "--eval_samples=5", "--resume=latest", "--max_steps=4",
                "rloo_group=prompt")  # fmt: skip
    assert "--override: rloo_group is prompt, the checkpoint had mixed." in again.log


def test_messages_about_the_model_name_the_key_that_says_it(refused, tmp_path):
    start = pipeline_start(tmp_path, "sd", "nowhere/at-all", flow=False)
    message = refused(start=start)
    assert message.startswith("model.backend_options.model_name_or_path nowhere/at-all is neither a pipeline folder nor")
    assert "; give a folder, or get it beforehand by `hf download nowhere/at-all`." in message
    message = refused(start=pipeline_start(tmp_path, "sd3", TEACHER, flow=True))
    assert "model.backend, model.dataset_name or the predictor ask for one of family sd3" in message and "--" not in message


@pytest.mark.parametrize("sentence, said", [
    ("--seed 3 is bad", "--config own.yaml: run.seed 3 is bad"),
    ("--eval_samples has no effect without --seed", "--eval_samples has no effect without run.seed"),  # the flag is at fault
    ("/runs/a--seed/x has no --backend", "/runs/a--seed/x has no model.backend"),
])  # fmt: skip
def test_flags_are_keys_in_sentences_but_not_in_paths(sentence, said):
    assert epd_rl_options.in_keys(sentence, {"seed": ("run.seed", "--config own.yaml")}) == said


def test_a_script_ends_with_code_2_and_one_line(run_script, start, tmp_path):
    given = [*flags(start, "ppo.rloo_k=3"), f"--output_dir={tmp_path / 'out'}"]
    code, err = run_script(*given, bare=True, script=SCRIPT)
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: ppo.rollout_batch_size 8")
