"""Answers compared by Math-Verify, in a process of its own that is ended when it takes too long."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from s2l_ray.core.answers.reading import gold_text, told_answer
from s2l_ray.errors import UserError

JUDGE = Path(__file__).with_name("judge.py")
# for one pair, and for loading the library
SECONDS, SECONDS_TO_START = 10.0, 300.0


class Verifier:
    """Asks Math-Verify about one pair at a time.

    Attributes:
        stopped: pairs that took longer than the limit, or ended the process; they count as wrong.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds, self.stopped = seconds, 0
        self._process: subprocess.Popen[bytes] | None = None

    def correct(self, generated: str, gold: str) -> bool:
        """Whether what a model wrote, as a whole or in its told answer, equals the gold answer."""
        process = self._running()
        # Several boxes together are one answer.
        wanted = gold if gold.count("\\boxed") > 1 else gold_text(gold)
        question = [wanted, generated, told_answer(generated)]
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            answer = self._line(process, self.seconds)
        except BrokenPipeError:
            answer = b""
        if not answer:
            self.stopped += 1
            self.close()
        return answer.strip() == b"1"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            self._process = subprocess.Popen(
                # Nothing beside the script is imported by its name.
                [sys.executable, "-P", str(JUDGE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            if self._line(self._process, SECONDS_TO_START) != b"ready\n":
                self.close()
                raise UserError(
                    "starting Math-Verify: its process did not come up. Install it on every node: "
                    "pip install 's2l_ray[evaluation]'."
                )
        return self._process

    @staticmethod
    def _line(process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else b""
