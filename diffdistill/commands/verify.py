"""`diffdistill verify`: a method against closed forms, and trained on a teacher known exactly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Literal

from diffdistill.catalogue import describe_method, method_names
from diffdistill.commands.check_config import VerifyConfig
from diffdistill.config import MachineConfig
from diffdistill.environment import use_machine
from diffdistill.errors import UserError
from diffdistill.exact.checks import Check, run_checks
from diffdistill.files import atomic_write
from diffdistill.options import build


def verify(
    method: str, *, exact: bool = False, device: Literal["auto", "cpu", "cuda"] = "cpu", threads: int = 0
) -> list[Check]:
    """The checks of a method, by name or file: its formulas, and unless `exact` also its trainings, half a minute each.

    The formulas are compared in float64 on the CPU, always; `device` is where the training is computed ('auto': a GPU
    if there is one), and `threads` are torch's CPU threads, 0 for its own choice. Each check has `name`, `expected`,
    `got`, `error`, `tolerance` and `ok`. The list is empty for a method that has no checks. Raises UserError for a
    method or a device that there is not.
    """
    return list(_checks(method, exact, device, threads))


def _checks(method: str, exact: bool, device: str, threads: int) -> Iterator[Check]:
    """The checks as they are made."""
    machine = build(MachineConfig, {"device": device, "threads": threads})
    place = use_machine(machine.device, machine.threads)
    info = describe_method(method)
    if formulas := info.verify:
        yield from run_checks(formulas)
    if info.plane is not None and not exact:
        from diffdistill.exact.plane import checks as end_to_end

        yield from end_to_end(info, place)


def run(config: VerifyConfig) -> int:
    """The command; 1 if a check fails."""
    if bool(config.method) == config.all:
        raise UserError("method: name one method to verify, or give --all instead")
    rows, failed = [], 0
    for name in method_names() if config.method is None else [config.method]:
        info = describe_method(name)
        if info.verify is None:
            where = f"in its file or in checks/{info.name}.py beside it"
            print(f"note: {info.name} has no verify(), {where}: nothing exact is checked")
        trained = 0 if config.exact else len(info.plane or {})
        print(f"{info.name}: {info.about.paper}" + (f"; {trained} trainings in the plane, last" if trained else ""))
        print(f"  {'':4} {'expected':>12} {'got':>12} {'error':>9} {'limit':>9}  check", flush=True)
        checks = []
        for c in _checks(name, config.exact, config.device, config.threads):
            checks.append(c)
            sign = "<=" if c.kind == "equal" else "> "
            verdict = "ok" if c.ok else "FAIL"
            print(
                f"  {verdict:4} {c.expected:12.6g} {c.got:12.6g} {c.error:9.1e} {sign}{c.tolerance:7.0e}  {c.name}",
                flush=True,
            )
            rows.append({"method": info.name, **dataclasses.asdict(c), "ok": c.ok})
            failed += not c.ok
        print(f"  {len(checks) - sum(not c.ok for c in checks)} of {len(checks)} hold\n")
    if config.json:
        atomic_write(config.json, json.dumps(rows, indent=2) + "\n")
    return 1 if failed else 0
