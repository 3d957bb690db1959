"""Mistakes in the methods whose student reads an image that is to be restored, and in what their teacher sees."""

_Y, _C = "tests/methods/test_yonos.py", "tests/methods/test_ctmsr.py"

MUTANTS = {
    f"methods/yonos.py | {_Y}": [
        ("the teacher sees what the student does", "batch.seen_by_teacher).v", "batch.cond).v"),
        ("the student sees what the teacher does", "x_t, t, batch.cond).v", "x_t, t, batch.seen_by_teacher).v"),
        ("x0 in place of v", "batch.seen_by_teacher).v.detach()", "batch.seen_by_teacher).x0.detach()"),
        ("a sum of errors", ".square().mean()", ".square().sum()"),
        ("fresh noise between steps", ", DDIM())", ")"),
        ("needs no second view", "{Need.IMAGES, Need.TEACHER_DATA}", "{Need.IMAGES}"),
    ],
    f"methods/ctmsr.py | {_C}": [
        ("kappa is ignored", "self.config.kappa * eta", "eta"),
        ("a grid of angles", "torch.atan2(self.config.kappa * eta, 1 - eta)", "eta * torch.pi / 2"),
        ("one noise for each end", "diffuse(x0, r, eps), r,", "diffuse(x0, r, eps.flip(0)), r,"),
        ("the target has a gradient", "with torch.no_grad(), seeded(seed", "with seeded(seed"),
        ("the end is the student's own", "torch.where(expand(r, x) <= 0, x0, less)", "less"),
        ("s0 stays", "max(s1, s0 - past)", "s0"),
        ("more steps never come", "min(s1, s0 + past)", "s0"),
        ("stages of other lengths", "(abs(s0 - s1) + 1)", "(abs(s0 - s1) + 2)"),
        ("matching from the start", "step >= self.config.consistency_steps", "step >= 0"),
        ("its weight is ignored", "self.config.matching_weight * matched", "matched"),
        ("matched at all points", "return low, high", "return 1, n + 1"),
        (
            "matched without the image",
            "self.judged(fixed, t, eps, batch.cond) - self.judged(x0, t, eps, batch.cond)",
            "self.judged(fixed, t, eps, batch.cond) - x0",
        ),
        ("the other way", "fixed - told)", "fixed + told)"),
        ("all samples weigh alike", "(weight * self.image_distance", "(1 * self.image_distance"),
        ("the whole of it", ".mean() / 2", ".mean()"),
        ("the judge is the student", "return self.judge(diffuse", "return self.student(diffuse"),
        ("the judge is never renewed", "since % self.config.renew_every == 0", "since % self.config.renew_every < 0"),
        ("the judge is renewed in each step", "since % self.config.renew_every == 0", "True"),
        ("the judge is renewed before its time", "and since >= 0 and", "and"),
        ("a grid without points is taken", "if low >= high:", "if False:"),
    ],
    f"diffdistill/scaffold/solo.py | {_Y} tests/methods/test_wiring_boot.py": [
        (
            "the teacher is not guided",
            "guided(frozen(teacher.denoiser), config",
            "(lambda x, g: x)(teacher.denoiser, config",
        ),
    ],
    f"diffdistill/scaffold/method.py | {_Y} tests/methods/test_wiring_imitating.py": [
        ("uniform times of another stream", 'purpose: str = "student/t"', 'purpose: str = "t"'),
        (
            "uniform times, squared",
            "native_uniform(self.schedule, n, draw)",
            "native_uniform(self.schedule, n, draw) ** 2",
        ),
        ("images are not noised", "return diffuse(batch.images, t,", "return diffuse(batch.images, 0 * t,"),
        ("noised images: another stream", 'batch.randn("student/eps")), t', 'batch.randn("eps")), t'),
        ("a part has all of the teacher's conditions", "else cut(self.teacher_cond)", "else self.teacher_cond"),
    ],
    f"diffdistill/data/batches.py | {_Y}": [
        ("the teacher's conditions are lost", "teacher_cond=its", "teacher_cond=cond")
    ],
    f"diffdistill/data/examples.py | {_Y}": [
        ("views: another number", "if len(self.student) != len(self.teacher):", "if False:"),
        ("views: other samples", "not torch.equal(seen.x0, by_teacher.x0)", "False"),
        ("views: the same", "if all(torch.equal(value, by_teacher", "if not all(torch.equal(value, by_teacher"),
    ],
    f"diffdistill/training/inputs.py | {_Y}": [
        ("the teacher's view is not told apart", " beside {_examples(examples.teacher)}", ""),
    ],
    "diffdistill/data/images.py | tests/data/test_conditions.py": [
        ("reduced: another factor", "(height // times, width // times)", "(height // times * 2, width // times * 2)"),
        ("reduced: not of 8 bits", "    small = (127.5 * small + 127.5).round() / 127.5 - 1\n", ""),
        ("reduced: captions stay", '[""] * len(indices)', "samples.captions"),
        ("reduced: one fingerprint", '{data.fingerprint} reduced {times}"', '{data.fingerprint}"'),
        ("reduced: sides that it does not divide", "any(side % times for side in data.shape[-2:])", "False"),
    ],
}
