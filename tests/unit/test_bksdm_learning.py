"""A short distillation of the golden toy teacher brings every student nearer to it, from its weights the most."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_conformance_bksdm import filled

from brisk import bksdm, schedules
from brisk.feature_taps import FeatureTaps

STEPS = 100
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


class Distillation:
    """Students of the golden cases of one teacher, trained on the same Gaussian latents and contexts."""

    def __init__(self, case, copies):
        """Args: `case`: of the golden losses; `copies`: for each student, whether it starts from the teacher's weights."""
        torch.manual_seed(0)
        self.teacher = filled(case["teacher_config"], torch.float32).eval().requires_grad_(False)
        self.students = [UNet2DConditionModel(**case["student_config"]) for _ in copies]
        state = self.teacher.state_dict()
        mapping = bksdm.weight_map(self.students[0].state_dict(), case["student_config"], case["teacher_config"])
        for student, copied in zip(self.students, copies, strict=True):
            if copied:
                student.load_state_dict({key: state[source] for key, source in mapping.items()})
        pairs = bksdm.feature_pairs(case["feature_set"], mapping, case["student_config"], case["teacher_config"])
        of_teacher, of_student = zip(*pairs, strict=True)
        self.of_teacher = FeatureTaps(self.teacher, of_teacher)
        self.taps = [FeatureTaps(student, of_student) for student in self.students]

    def losses(self, seed):
        """(L_task, L_out, L_feat) of each student on one batch of four."""
        draw = torch.Generator().manual_seed(seed)
        latents, noise = (torch.randn(4, 4, 16, 16, generator=draw) for _ in range(2))
        text, t = torch.randn(4, 7, 16, generator=draw), torch.randint(1000, (4,), generator=draw)
        a, s = schedules.signal_and_noise(ALPHAS[t], latents)
        call = (a * latents + s * noise, t, text)
        self.of_teacher.arm()
        goal = self.teacher(*call, return_dict=False)[0]
        goals, found = self.of_teacher.read(), []
        for student, taps in zip(self.students, self.taps, strict=True):
            taps.arm()
            output = student(*call, return_dict=False)[0]
            features = bksdm.feature_loss(taps.read(), goals).sum()
            found.append((bksdm.output_loss(output, noise), bksdm.output_loss(output, goal), features))
        return found

    def measured(self):
        """[(L_out, L_feat)] on a fixed batch."""
        with torch.no_grad():
            return [(output.item(), features.item()) for _, output, features in self.losses(10**6)]

    def train(self):
        """`measured` before and after `STEPS` steps."""
        before = self.measured()
        groups = [list(student.parameters()) for student in self.students]
        optimizer = torch.optim.AdamW(sum(groups, []), lr=1e-3, weight_decay=1e-2, fused=True)
        for step in range(STEPS):
            optimizer.zero_grad()
            sum(sum(terms) for terms in self.losses(step)).backward()
            for group in groups:
                torch.nn.utils.clip_grad_norm_(group, 1.0)
            optimizer.step()
        return before, self.measured()


@pytest.fixture(scope="module")
def golden(root):
    """The golden cases of the toy teacher, by name."""
    cases = json.loads((root / "tests/assets/conformance/bksdm/losses_sd_eps.json").read_text())
    return {case["name"]: case for case in cases}


def assert_learned(before, after):
    assert after[0] <= 0.55 * before[0] and after[1] <= 0.5 * before[1]


@pytest.mark.parametrize("size", ["small", "tiny"])
def test_a_hundred_steps_bring_the_student_nearer_to_the_teacher(size, golden):
    before, after = Distillation(golden[f"sd_{size}_bk_eps"], [True]).train()
    assert_learned(before[0], after[0])


def test_the_teachers_weights_are_a_better_start_than_random_ones(golden):
    before, after = Distillation(golden["sd_base_bk_eps"], [True, False]).train()
    assert_learned(before[0], after[0])
    assert after[0][0] < 0.8 * after[1][0] and after[0][1] < 0.6 * after[1][1]
    assert after[1][0] < before[1][0] and after[1][1] < before[1][1], "the random one learns too, only less"
