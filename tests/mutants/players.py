"""Mistakes in what a LoRA player takes besides, in jumps of one time, and in levels that a folder hands over."""

_I, _T, _L = "tests/players/test_lora_inputs.py", "tests/players/test_two_times.py", "tests/pipelines/test_levels.py"
_O = "tests/pipelines/test_own_levels.py"
_N = "tests/players/test_two_networks.py"

MUTANTS = {
    "diffdistill/players/quantized.py | tests/players/test_quantized.py": [
        ("8 bits are 4", "if bits == 8:", "if bits == 4:"),
        ("all layers are packed as if for the CPU alone", "            made.support_avx512bf16_for_cpu = False\n", ""),
        ("a plan forgets the scales", "size = bits / 8 + _STATISTICS[bits]", "size = bits / 4"),
    ],
    "diffdistill/commands/distill.py | tests/players/test_quantized.py": [
        (
            "the student is merged into what it was trained on",
            "trainer.divided or config.teacher_bits:",
            "trainer.divided:",
        ),
    ],
    f"diffdistill/players/two_times.py | {_I}": [
        (
            "lora: another gap is folded",
            "return self.of_gap(self.default)[0]",
            "return self.of_gap(0.7 * self.default)[0]",
        ),
        ("lora: the gap is always its own", "self.default if self.given is None else self.given", "self.default"),
        (
            "lora: in the base's type",
            "TimeGap.__init__(self, trained_like(layer.weight), default)",
            "TimeGap.__init__(self, layer.weight, default)",
        ),
        (
            "low rank: one component too few",
            "k = int((s > 1e-9 * s[0]).sum()) or 1",
            "k = max(int((s > 1e-9 * s[0]).sum()) - 1, 1)",
        ),
        ("low rank: without the singular values", "v[:k].T * s[:k]", "v[:k].T"),
        (
            "low rank: the inverse is turned",
            "u[:, :k].T @ torch.linalg.pinv(hidden).T",
            "u[:, :k].T @ torch.linalg.pinv(hidden.flip(0)).T",
        ),
    ],
    f"diffdistill/players/call_inputs.py | {_I} {_T}": [
        ("lora: nothing is added", "            return self.added(output)", "            return output"),
        ("lora: the default is not folded", "        self.put_into(layer)\n", "        pass\n"),
        ("the default is not put into a layer", "            module.put_into(module.layer)\n", ""),
        ("a linear layer gives as before", "add_to_bias(layer, self.usual())", "pass"),
        ("a table gives as before", "layer.weight += self.usual()", "layer.weight += 0 * self.usual()"),
        (
            "a call leaves what it was given",
            "        for part, earlier in zip(parts, before, strict=True):\n            part.given = earlier",
            "        pass",
        ),
        ("nothing is added in a layer's place", "return self.added(self.layer(inputs))", "return self.layer(inputs)"),
    ],
    f"diffdistill/players/two_times.py | {_T}": [
        ("one time: another bias", "add_to_bias(layer, change[-1])", "add_to_bias(layer, 0 * change[-1])"),
        (
            "one time: no weights",
            "layer.weight += change[:-1].T.to(layer.weight)",
            "layer.weight += 0 * change[:-1].T.to(layer.weight)",
        ),
    ],
    f"diffdistill/players/lora.py | {_I}": [
        (
            "inputs are every player's",
            ".setdefault(self.adapter, []).append(part)",
            '.setdefault("player0", []).append(part)',
        ),
        ("inputs do not come and go", "for part in inputs_of(base, adapter)]", "for part in inputs_of(base, None)]"),
        ("inputs stay", '    for detach in vars(base).pop("_detach", []):\n        detach()\n', ""),
        (
            "copies have no inputs",
            "            twin.add_input(name, copy.deepcopy(part, memo))\n",
            "            pass\n",
        ),
        ("copies share their inputs", "twin.add_input(name, copy.deepcopy(part, memo))", "twin.add_input(name, part)"),
        ("the inputs are not merged", "        part.fold(whole)  # type", "        pass  # type"),
        ("the inputs are merged twice", "{} if network.folds_inputs else network.changes", "network.changes"),
        ("the changes are not merged", "{} if network.folds_inputs else network.changes", "{}"),
        (
            "the changes are not in the LoRA",
            "for layer, (down, up) in network.changes.items():\n        for",
            "for layer, (down, up) in {}.items():\n        for",
        ),
        ("ranks differ", "for name, value in weights.items() if network.changes else ():", "for name, value in ():"),
        ("alpha is not in B", 'value * scale if ".lora_B." in name else value', "value"),
        (
            "inputs are as the base's type",
            "return weight.float() if weight.dtype in",
            "return weight if weight.dtype in",
        ),
        (
            "an input that cannot stand alone does",
            "return all(bool(part.alone) for part",
            "return True or all(bool(part.alone) for part",
        ),
    ],
    f"diffdistill/players/scale_input.py | {_I}": [
        (
            "lora: the scale is always the default",
            "scale = self.default.expand(len(output)) if self.given is None else self.given",
            "scale = self.default.expand(len(output))",
        ),
        (
            "lora: another scale is the default",
            "self.begin(layer, trained_like(layer.weight).dtype, default)",
            "self.begin(layer, trained_like(layer.weight).dtype, 1.0)",
        ),
        (
            "lora: the input is in the base's type",
            "self.begin(layer, trained_like(layer.weight).dtype, default)",
            "self.begin(layer, layer.weight.dtype, default)",
        ),
    ],
    f"diffdistill/players/sampler.py | {_I}": [
        (
            "lora: jumps stay a second time",
            "return network.with_changes(low_rank_changes(self.denoiser, *at),",
            "return network.with_changes({},",
        ),
        ("lora: inputs are folded always", "folds_inputs=self.equal_jumps)", "folds_inputs=True)"),
        (
            "lora: a jump leads to the next but one",
            "for k in range(len(self.levels))]).to(weight.device)\n        return",
            "for k in range(1, len(self.levels) + 1)]).to(weight.device)\n        return",
        ),
    ],
    f"diffdistill/players/sampler.py | {_T}": [
        ("all jumps are equal", "return bool((gaps - gaps[0]).abs().max() < 1e-6)", "return True"),
    ],
    f"pipelines/schedulers.py | {_L}": [
        (
            "rows: another scheduler of a flow",
            "return diffusers.FlowMatchEulerDiscreteScheduler(schedule.train_timesteps)",
            "return diffusers.FlowMatchEulerDiscreteScheduler(500, schedule.shift)",
        ),
        (
            "rows: a flow is shifted twice",
            "return diffusers.FlowMatchEulerDiscreteScheduler(schedule.train_timesteps)",
            "return diffusers.FlowMatchEulerDiscreteScheduler(schedule.train_timesteps, 3.0)",
        ),
        (
            "rows: where there is a stock row",
            "    try:\n        _stock_scheduler(teacher, sampler)\n    except UserError:\n",
            "    if True:\n",
        ),
        ("rows: the last step goes on", "return level, 0.0, 1.0, 0.0", "return level, 0.0, 1.0, 0.1"),
        (
            "rows: the level is the next one",
            "    return level, own * size(s)",
            "    return sampler.levels[k + 1], own * size(s)",
        ),
        ("rows: the sample is not rescaled", "own * size(s) / size(t)", "own"),
        ("rows: the clean sample has unit variance", "clean * size(s) / schedule.data_std", "clean * size(s)"),
        ("rows: fresh noise of the normal form", "fresh * size(s)\n", "fresh\n"),
        ("rows: no fresh noise", "math.sqrt(max(1 - kept**2, 0.0))", "0.0"),
        (
            "rows: gamma's own angle is the level's",
            "(schedule.angle(level), sampler.leads(k),",
            "(schedule.angle(level), schedule.angle(sampler.levels[k + 1]),",
        ),
        ("rows: the sample is not shrunk", "own = kept * math.sin(r)", "own = math.sin(r)"),
        (
            "rows: of the first level alone",
            "_row(sampler, k) for k in range(len(sampler.levels))]",
            "_row(sampler, 0) for k in range(len(sampler.levels))]",
        ),
    ],
    f"pipelines/shipped/student_pipeline.py | {_L}": [
        ("levels: the greatest sigma stays", '{"sigma_max": level} if "sigma_max" in config else {}', "{}"),
        (
            "levels: a flow's are its own",
            '{"sigmas": [level]} if "shift" in config else {"num_inference_steps": 1}',
            '{"num_inference_steps": 1}',
        ),
        ("levels: timesteps are the last one", "once.timesteps = torch.tensor([int(level)])", "pass"),
        ("levels: the first noise has variance one", 'getattr(self._once[0], "init_noise_sigma", 1.0)', "1.0"),
        ("levels: the first step's for all", "return int((self.timesteps - timestep).abs().argmin())", "return 0"),
        (
            "levels: the input is not scaled",
            'if hasattr(once, "scale_model_input") else sample',
            "if False else sample",
        ),
        ("levels: nothing of the sample is kept", "        if kept:\n", "        if False:\n"),
        ("levels: no fresh noise is added", "        if fresh:\n", "        if False:\n"),
        (
            "levels: noise of nobody's generator",
            "randn_tensor(sample.shape, generator=generator,",
            "randn_tensor(sample.shape, generator=None,",
        ),
        ("levels: the scheduler stays", '        pipeline.__dict__["scheduler"] = before\n', "        pass\n"),
        ("levels: any number is taken", "if steps == own or not (others or alone):", "if steps == own or not others:"),
        (
            "levels: are those of the call's number alone",
            "at_levels(self, self._rows.get(steps)),",
            "at_levels(self, self._rows.get(own)),",
        ),
        (
            "levels: settings are the last folder's",
            "call = {{**self._call, **named",
            "call = {{**globals().setdefault('_c', self._call), **named",
        ),
        ("levels: a copy loads plainly", 'if call["num_inference_steps"] in rows else base', "if False else base"),
    ],
    f"pipelines/steps.py | {_L}": [
        ("own rows are left out", "        others.rows[own] = rows\n", "        pass\n"),
        ("others' rows are left out", "            others.rows[steps] = rows\n", "            pass\n"),
        ("one step has another scheduler", "if own in others.rows and steps == 1:", "if False:"),
    ],
    f"pipelines/export.py | {_L}": [
        ("the folder loads plainly", "if len(record.levels) in others.rows:", "if False:"),
    ],
    f"pipelines/schedulers.py | {_O}": [
        ("sigmas are not handed over", 'else {"sigmas": levels}', "else {}"),
        ("timesteps are not handed over", 'return {"timesteps": [int(level) for level in levels]}', "return {}"),
        ("timesteps are always handed over", "if scheduler.timesteps.tolist() == levels:", "if False:"),
        (
            "fresh noise is TCD's",
            "    if not fresh:\n        return _tcd(sampler)",
            "    if True:\n        return _tcd(sampler)",
        ),
        (
            "a list of sigmas is shifted",
            "getattr(diffusers, kind)(schedule.train_timesteps)",
            "getattr(diffusers, kind)(schedule.train_timesteps, 3.0)",
        ),
    ],
    f"pipelines/card.py | {_O}": [
        ("TCD's own share of noise", 'call["eta"] = 0.0', "pass"),
        ("the call has no levels", "call |= (arguments := level_arguments(teacher, sampler))", "arguments = {}"),
    ],
    f"diffdistill/scaffold/method.py | {_O}": [
        ("the user's levels are not tried", 'check_levels(self.schedule, own.levels, "levels")', "pass"),
        (
            "the user's levels are ignored",
            "if own.levels is not None and steps in (None, len(own.levels)):",
            "if False:",
        ),
    ],
    f"diffdistill/options/groups.py | {_O}": [
        ("levels rise", "any(a <= b for a, b in pairwise(levels))", "False"),
        ("levels come twice", "any(a <= b for", "any(a < b for"),
        ("levels do not say the steps", "object.__setattr__(self, name, value)", "pass"),
    ],
    "diffdistill/families/qwen_image21.py | tests/eval/test_negative_prompts.py": [
        ("a folder's own sigmas are the steps", '"true_cfg_scale": 1.0, "sigmas": sigmas}', '"true_cfg_scale": 1.0}'),
    ],
    "diffdistill/core/rows.py | tests/core/test_rows.py": [
        ("samples come back in the order of their lengths", "torch.cat(list(rows)).argsort()", "torch.cat(list(rows))"),
        ("prompts of all lengths go in one call", "if len(kinds) == 1:", "if True:"),
    ],
    "diffdistill/core/denoiser.py | tests/core/test_rows.py": [
        ("of two networks lengths are the batch's", "compute(rows if some is None else rows[some])", "compute(some)"),
        ("a discriminator's prompts go in one call", "is None and self.lengths is None:", "is None:"),
        ("another network's prompts go in one call", "            lengths=self.lengths,\n", ""),
    ],
    f"diffdistill/core/experts.py | {_N}": [
        ("the boundary is the second network's", "time.detach() >= self.boundary", "time.detach() > self.boundary"),
        ("the networks are exchanged", "(first, ~first)", "(~first, first)"),
        (
            "samples come back in another order",
            "[rows for _, rows in shares])",
            "[rows for _, rows in reversed(shares)])",
        ),
        ("a discriminator reads the first network", 'f"{self.chosen}.{name', 'f"{self.names[0]}.{name'),
        ("the second network always goes along", "any(time < experts.boundary for time in times)", "True"),
        ("the second network never goes along", "any(time < experts.boundary for time in times)", "False"),
    ],
    f"diffdistill/core/denoiser.py | {_N}": [
        (
            "the scales are exchanged",
            "self._time(x_t, t)), scale, self.second_scale",
            "self._time(x_t, t)), self.second_scale, scale",
        ),
        ("the second scale is everywhere", "experts.is_first(self._time(x_t, t)), scale", "t < 0, scale"),
        ("the first scale is everywhere", "if self.second_scale is None or", "if True or"),
    ],
    f"diffdistill/training/assemble.py | {_N}": [
        (
            "a training has one scale",
            "    if not isinstance(own, TeacherGuidance):",
            "    if True:",
        ),
    ],
    f"diffdistill/data/pairs.py | {_N}": [
        ("pairs have one scale", "config.guidance_scale, second=config.guidance_scale_2)", "config.guidance_scale)"),
        ("pairs of another second scale go on", '"guidance_scale", "guidance_scale_2", ', '"guidance_scale", '),
    ],
    f"diffdistill/players/teacher.py | {_N}": [
        ("players have the teacher's second scale", "    twin.second_scale = None", "    pass"),
    ],
    f"methods/swiftbrush.py | {_N}": [
        ("the fake score has one scale", ", second=config.guidance_scale_2", ""),
    ],
    f"methods/disback.py | {_N}": [
        ("copies have one scale", "each, scale, second=second)", "each, scale)"),
    ],
    f"pipelines/record.py | {_N}": [
        ("the record has one scale", "second=second)", "second=None)"),
    ],
    f"eval/ladder.py | {_N}": [
        ("the teacher of a student has one scale", "student.negative, student.second)", "student.negative, None)"),
        (
            "the rows have one scale",
            "partial(teacher_images, teacher, second=second)",
            "partial(teacher_images, teacher)",
        ),
    ],
    f"pipelines/export.py | {_N}": [
        ("both LoRA files are the first network's", 'key.startswith(f"{name}.")', 'key.startswith("transformer.")'),
    ],
    f"diffdistill/families/_loading.py | {_N}": [
        (
            "the second network is the first",
            "load_part(model, folder / name, dtype)",
            "load_part(model, folder / family.component, dtype)",
        ),
    ],
}
