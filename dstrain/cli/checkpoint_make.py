"""Actions of ``dstrain checkpoint`` that write or remove: export, convert, import, prune."""

from __future__ import annotations

from argparse import Namespace

from dstrain.cli.checkpoint_tools import checkpoints, quiet


def export(options: Namespace) -> int:
    """Write the model of a checkpoint as a Hugging Face folder."""
    from tqdm import tqdm

    from dstrain import checkpoint
    from dstrain.checkpoint import read_manifest

    (folder,) = checkpoints(options.dir)[-1:]
    total = len(read_manifest(folder).parameters)
    with (
        tqdm(unit="B", unit_scale=True, desc="verify", disable=quiet()) as verified,
        tqdm(total=total, unit=" tensors", desc="export", disable=quiet()) as bar,
    ):
        count = checkpoint.export(
            folder,
            options.out,
            dtype=options.dtype,
            shard_bytes=options.max_shard_bytes,
            on_tensor=lambda name, num_bytes: bar.update(),
            on_file=verified.update,
        )
    print(f"{count} tensors of {folder} are in {options.out}")
    return 0


def convert(options: Namespace) -> int:
    """Write a checkpoint as a folder in DeepSpeed's universal format."""
    from tqdm import tqdm

    from dstrain import checkpoint

    (folder,) = checkpoints(options.dir)[-1:]
    with (
        tqdm(unit="B", unit_scale=True, desc="verify", disable=quiet()) as verified,
        tqdm(unit="B", unit_scale=True, desc="convert", disable=quiet()) as bar,
    ):
        done = checkpoint.convert(
            folder,
            options.out,
            on_tensor=lambda name, num_bytes: bar.update(num_bytes),
            on_file=verified.update,
        )
    print(f"{options.out}: step {done.step}, {done.num_parameters} parameters, of {folder}")
    for remark in done.remarks:
        print(f"  {remark}")
    print(
        'load it with {"checkpoint": {"load_universal": true}} in DeepSpeed\'s config and '
        f"engine.load_checkpoint({str(options.out)!r}), at ZeRO stage 1, 2 or 3"
    )
    return 0


def import_checkpoint(options: Namespace) -> int:
    """Write a checkpoint of DeepSpeed or transformers as a checkpoint of dstrain."""
    from tqdm import tqdm

    from dstrain import checkpoint

    with tqdm(unit="B", unit_scale=True, desc="import", disable=quiet()) as bar:
        done = checkpoint.import_checkpoint(
            options.source,
            options.out,
            samples_per_epoch=options.samples_per_epoch,
            global_batch_size=options.global_batch_size,
            on_tensor=lambda name, num_bytes: bar.update(num_bytes),
        )
    print(f"{options.out}: step {done.step}, {done.num_parameters} parameters, from {done.kind}")
    for remark in done.remarks:
        print(f"  {remark}")
    print(f"train on with --resume_from_checkpoint {options.out}")
    return 0


def prune(options: Namespace) -> int:
    """Remove old checkpoints of a run, and print which are removed and which are kept."""
    from tqdm import tqdm

    from dstrain import checkpoint

    bar = tqdm(unit="B", unit_scale=True, desc="verify the newest", disable=quiet())
    with bar:
        done = checkpoint.prune(
            options.dir, keep=options.keep, dry_run=options.dry_run, on_file=bar.update
        )
    for found in done.removed:
        print(f"{'would remove' if options.dry_run else 'removed'} {found.folder}")
    for found, reason in done.kept:
        print(f"kept {found.folder}{f': {reason}' if reason else ''}")
    return 0
