"""Images that turn out damaged in the middle of a training: skipped and counted, up to a limit."""

from __future__ import annotations

import sys
from dataclasses import replace

from diffdistill.data.images import Data, Samples
from diffdistill.errors import UserError, one_line


def skipping(data: Data, limit: int) -> Data:
    """The data, in which the next image that can be read stands for one that cannot, up to `limit` such images.

    Each is named on standard error when it is met first. Which image stands for which does not depend on the order in
    which they are met. UserError for one image more.
    """
    stands_for: dict[int, int] = {}  # image -> the one after it

    def read(rows: list[int]) -> Samples:
        while True:
            there = [_followed(stands_for, row) for row in rows]
            try:
                return data.read(there)
            except UserError as error:
                if not _found(there, error):
                    raise

    def _found(rows: list[int], error: UserError) -> bool:
        """Whether single images among the rows are what cannot be read; they are then known."""
        before = len(stands_for)
        for row in dict.fromkeys(rows):
            try:
                data.read([row])
            except UserError as single:
                if len(stands_for) == min(limit, len(data) - 1):
                    raise UserError(
                        f"{single}; {limit} other images are skipped already, as many as --skip-unreadable allows"
                    ) from error
                stands_for[row] = (row + 1) % len(data)
                count = f"{len(stands_for)} of at most {limit}"
                warning = one_line(f"warning: {single}")
                print(f"{warning}; it is skipped ({count}), and the next image stands for it", file=sys.stderr)
        return len(stands_for) > before

    return replace(data, read=read) if limit else data


def _followed(stands_for: dict[int, int], row: int) -> int:
    while row in stands_for:
        row = stands_for[row]
    return row
