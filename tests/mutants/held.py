"""Mistakes in what holds the steps of a student besides its matching: the anchor, and points inside of steps.

And in which of several students has which classes.
"""

_MS = "tests/methods/test_multi_student.py"

MUTANTS = {
    "diffdistill/scaffold/matching.py | tests/methods/test_midpoint.py": [
        ("midpoint: its weight is ignored", "self.midpoint_weight * distance", "distance"),
        (
            "midpoint: the teacher is not guided",
            "self.teacher = self.followed = guided(",
            "self.followed = frozen(teacher.denoiser)\n        self.teacher = guided(",
        ),
        (
            "midpoint: the student in the teacher's place",
            "ddim_step(self.followed, predicted.x_t",
            "ddim_step(self.student, predicted.x_t",
        ),
        (
            "midpoint: the teacher in the student's place",
            "ddim_step(self.student, x_m, t_m",
            "ddim_step(self.followed, x_m, t_m",
        ),
        (
            "midpoint: the target begins at the step's own time",
            "ddim_step(self.student, x_m, t_m",
            "ddim_step(self.student, x_m, t",
        ),
        ("midpoint: samples are compared", "predicted.at(s), target", "predicted.x0, target"),
        ("midpoint: to clean data", '.levels, STEPS["ddim"]).leads', ".levels, self.move).leads"),
        ("midpoint: to the first level", ".leads(self.level(batch))", ".leads(0)"),
        ("midpoint: no margin", ".clamp(max=self.config.midpoint_margin)", " * 0"),
        ("midpoint: the margin of a long step", ".clamp(max=self.config.midpoint_margin)", ""),
        ("midpoint: a margin that is too wide", "((last - first) / 2).clamp", "(last - first).clamp"),
        ("midpoint: the times of the matching", 'batch.uniform("midpoint/t")', 'batch.uniform("student/t")'),
    ],
    "methods/decoupled_dmd.py | tests/methods/test_midpoint.py tests/methods/test_anchor.py": [
        ("nothing holds its steps", "return x, self.with_targets(outcome, predicted, batch)", "return x, outcome"),
    ],
    "diffdistill/scaffold/matching.py | tests/methods/test_anchor.py": [
        (
            "anchor: the first step is matched",
            "range(1 if self.anchor_weight else 0, self.steps)",
            "range(self.steps)",
        ),
        (
            "anchor: steps are noisy",
            'self.move = STEPS["ddim"]\n',
            'self.move = STEPS["renoise"]\n',
        ),
        ("anchor: its weight is ignored", "self.anchor_weight * anchor", "anchor"),
        ("anchor: the samples' own noise", 'batch.randn("anchor/z")', 'batch.randn("z")'),
        ("anchor: to the first level", "sampler.levels[1])", "sampler.levels[0] * 0.9)"),
        (
            "anchor: the teacher has a gradient",
            "solve(ddim_step, self.followed, x_t,",
            "solve(ddim_step, self.student, x_t,",
        ),
        ("anchor: the distance of samples", "expand(torch.sin(t - s), ours)", "1.0"),
        ("anchor: another number of steps", "self.config.anchor_steps + 1", "self.config.anchor_steps + 2"),
        ("anchor: a fake score too many", "in self.matched_levels()[1:]]", "in range(self.steps - 1)]"),
    ],
    f"diffdistill/core/experts.py | {_MS}": [
        (
            "several: the first has all",
            "whose == k).nonzero()[:, 0]) for k, name",
            "whose * 0 == k).nonzero()[:, 0]) for k, name",
        ),
        (
            "several: labels of other samples",
            'cond["class_labels"], len(self.names)',
            'cond["class_labels"].flip(0), len(self.names)',
        ),
        ("several: a layer of the first", "(str(self.chosen), name)", "(self.names[0], name)"),
    ],
    f"diffdistill/players/class_experts.py | {_MS}": [
        ("several: parts in turn", "label * n // classes", "label % n"),
        (
            "several: one network for all",
            "[trainable_copy(denoiser).network for _ in range(max(parts) + 1)]",
            "[trainable_copy(denoiser).network] * (max(parts) + 1)",
        ),
        ("several: any parts go on", "or experts.parts != tuple(parts)", "or False"),
    ],
    f"diffdistill/families/_by_class.py | {_MS}": [
        ("by class: the first has all", "(whose == k)", "(whose * 0 == k)"),
        ("by class: rows stay in shares", "[torch.cat(there).argsort()]", ""),
        ("by class: labels of all", "labels = class_labels[rows]", "labels = class_labels[: len(rows)]"),
        (
            "by class: the code stays",
            "(Path(save_directory) / FILE).write_bytes",
            "(Path(save_directory).parent / FILE).write_bytes",
        ),
        ("by class: one network is saved", "nn.ModuleList(networks)", "nn.ModuleList([networks[0]] * len(networks))"),
    ],
    f"diffdistill/families/_loading.py | {_MS}": [
        (
            "by class: they are loaded as one",
            "of_classes(one.denoiser, list(network.networks), parts)",
            "of_classes(one.denoiser, [network.networks[0]] * len(network.networks), parts)",
        ),
    ],
    f"methods/multi_student.py | {_MS}": [
        ("one fake score", "teacher.player(role), parts) for role", 'teacher.player("student"), parts) for role'),
        ("LoRA is not seen", "if teacher.lora:", "if False:"),
    ],
    f"pipelines/export.py | {_MS}": [
        (
            "by class: the index names the teacher's",
            "if isinstance(carried := networks.get(entry.component), ByClass | Equilibrium):",
            "if isinstance(carried := None, Equilibrium):",
        ),
        (
            "by class: any layout",
            "if isinstance(network, ClassExperts | EquilibriumTransformer):\n        for",
            "if False:\n        for",
        ),
    ],
    f"pipelines/card.py | {_MS}": [
        ("by class: the card trusts nothing", "self.coded or several or", "self.coded or"),
    ],
}
