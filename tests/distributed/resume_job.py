"""A short run with checkpoints, for tests that need processes of their own.

``python -m tests.distributed.resume_job FOLDER SETTINGS RESUME``: settings of ``make_trainer`` in
JSON; RESUME as ``train`` takes it, "" for a fresh start. Rank 0 writes FOLDER/outcome.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Run."""
    from tests.distributed.runs import history, losses, make_trainer, weights_digest

    folder, settings, resume = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    trainer = make_trainer(folder, **settings)
    trainer.train(resume or False)
    digest = weights_digest(trainer)
    if trainer.ranks.is_main:
        outcome = {
            "losses": losses(trainer),
            "history": history(trainer),
            "weights": digest,
            "step": trainer.state.global_step,
        }
        (folder / "outcome.json").write_text(json.dumps(outcome))
    trainer.close()


if __name__ == "__main__":
    main()
