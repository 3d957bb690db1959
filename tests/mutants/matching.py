"""Mistakes in the methods that play with a fake score, and in what they share."""

_R = "tests/methods/test_wiring_ratio.py"

MUTANTS = {
    f"methods/f_distill.py | {_R}": [
        ("one weight for all levels", "for _ in self.fake_scores)", "for _ in self.fake_scores[:1])"),
        ("nothing is kept", 'self.state = {"weights": self.weights}', "self.state = {}"),
        ("the normaliser is always there", "normalise=c.normalise", "normalise=True"),
        ("the teacher is the fake score", "self.teacher, self.fake_score,", "self.fake_score, self.teacher,"),
        ("the ratio of the images", "].logits(x, t, eps, cond), t)", "].logits(x, t, 0 * eps, cond), t)"),
        ("the ratio at other noise", "].logits(x, t, eps, cond), t)", "].logits(x, t.flip(0), eps, cond), t)"),
        ("the parts of other noise", "logits(x, t, eps, cond), t)", "logits(x, t, eps, cond), t.flip(0))"),
        ("the first level's discriminator", "self.adversaries[self.place]", "self.adversaries[0]"),
        ("the first level's means", "self.weights[self.place]", "self.weights[0]"),
        ("no weight", "expand(h, gradient) * gradient", "gradient"),
        ("the unit is left out", "unit * loss", "loss"),
        ("the unit is always there", "self.schedule.data_std if c.normalise else 1.0", "self.schedule.data_std"),
        ("the means stay", "weight.update()", "pass"),
        ("samples are not noised", "x_t = self.config, diffuse(x, t, eps)", "x_t = self.config, x"),
    ],
    f"diffdistill/scaffold/ratio.py | {_R} tests/methods/test_f_distill.py": [
        ("the range is ignored below", "clamp(c.ratio_low, c.ratio_high)", "clamp(0.1, c.ratio_high)"),
        ("the range is ignored above", "clamp(c.ratio_low, c.ratio_high)", "clamp(c.ratio_low, 20.0)"),
        ("parts of half the range", "(math.pi / 2) * bins", "math.pi * bins"),
        ("the divergence is ignored", "WEIGHTS[options.divergence]", 'WEIGHTS["jensen_shannon"]'),
        ("the mean of the ratio is not divided by", "relative = r / (part @ self.ratio.to(r))", "relative = r"),
        ("the mean of the weight is not divided by", "return h / self.weight.to(h)", "return h"),
        ("the mean of relative ratios", "[r @ part, part", "[relative @ part, part"),
        ("the rate is ignored", "means, self.options.ratio_ema)", "means, 0.9)"),
        (
            "the rate is what is new",
            "torch.lerp(total / count.clamp_min(1), means,",
            "torch.lerp(means, total / count.clamp_min(1),",
        ),
        ("sums are kept from step to step", "        self.sums.zero_()\n", ""),
        ("the last pass alone counts", "self.sums += sums", "self.sums[:] = sums"),
        ("the first head alone counts", "reshape(-1, len(t)).mean(0)", "reshape(-1, len(t))[0]"),
        ("parts that were not seen move", "torch.where((count > 0) &", "torch.where((count >= 0) &"),
        ("the weight starts at one", "self.h(torch.ones(1))", "torch.ones(1)"),
        ("sums are kept in checkpoints", "persistent=False", "persistent=True"),
        ("the gradient passes the logits", "logits.detach().reshape", "logits.reshape"),
    ],
    "diffdistill/scaffold/matching.py | " + _R: [
        ("the place is always the first", "k = self.place = self._mine", "k = self._mine"),
    ],
}
