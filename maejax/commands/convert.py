"""Weights in and out: official MAE, timm, Hugging Face, big_vision, safetensors, ONNX.

examples:
  maejax convert runs/photos out/ --to=timm --verify
  maejax convert mae_pretrain_vit_base_full.pth runs/imported

--to names a format: timm, huggingface, facebook, safetensors, big_vision, onnx. Without it the target is a run, which
`pretrain --from`, `finetune --from`, `reconstruct` and `maejax.load_encoder` take. A source is a run, or weights from
elsewhere: official MAE files, timm's, Hugging Face's ViTMAE and ViT, big_vision's .npz, or a folder that this wrote.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from maejax.commands.arguments import Parser, prepare_libraries
from maejax.errors import UsageError, look_up


def run(arguments: Sequence[str]) -> None:
    """maejax convert."""
    parser = Parser("convert", __doc__)
    parser.add_argument("source", type=Path, help="a run, or a file or folder of weights")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--to", metavar="FORMAT", help="what to write (default: a run)")
    parser.add_argument("--encoder-only", action="store_true", help="leave the decoder behind")
    parser.add_argument(
        "--verify", action="store_true", help="compute the written network with its own library, or numpy"
    )
    parser.add_argument(
        "--norm-pix", action=argparse.BooleanOptionalAction, help="importing: the decoder regresses normalised patches"
    )
    parser.add_argument("--heads", type=int, metavar="N", help="importing: attention heads, where nothing tells them")
    parser.add_argument("--decoder-heads", type=int, metavar="N", help="the decoder's (default: 16)")
    parser.add_argument("--image-size", metavar="H[,W]", help="importing: where the position table is not of a square")
    prepare_libraries()
    convert(parser.parse_args(arguments))


def convert(options: argparse.Namespace) -> None:
    """Reads, checks, writes and, if asked to, verifies."""
    from maejax.convert.write import FORMATS, check_target

    format, encoder_only = options.to, options.encoder_only
    if format is not None:
        look_up(FORMATS, format, "--to")
    check_target(options.out)
    if not options.source.exists():
        raise UsageError(f"{options.source} does not exist; expected a run, or a file or folder of weights")
    from maejax.convert import files, names, onnx, read, verify, weights, write
    from maejax.convert.infer import Hints

    if format == "onnx":
        onnx.check()
    hints = Hints(options.norm_pix, options.heads, options.decoder_heads, _image_size(options.image_size))
    own = weights.is_run(options.source)
    if own and format is None:
        raise UsageError(f"{options.source} is a run already; say what to make of it: --to={', '.join(FORMATS)}")
    if own and hints != Hints():
        raise UsageError("--norm-pix, --heads, --decoder-heads and --image-size are for weights from elsewhere")
    found = weights.of_run(options.source) if own else read.read(options.source, hints)
    for note in found.notes:
        print(note)
    kept, left = write.chosen(found, format or "safetensors", encoder_only)
    tensors = write.plan(kept, format, encoder_only) if format else None
    with write.draft(options.out) as folder:
        if tensors is None:
            weights.save_run(kept, folder)
            written = sorted(str(path.relative_to(folder)) for path in folder.iterdir())
        else:
            expected, pending = tensors
            write.write(kept, folder, format, encoder_only, pending)
            written = sorted(path.name for path in folder.iterdir())
            file = next((folder / name for name in ("model.safetensors", "model.npz") if name in written), None)
            if file is not None:  # what is there now is what should be
                names.compare(str(file), expected, {name: t.shape for name, t in files.open_tensors(file)[0].items()})
            print(f"mapped {len(expected)}/{len(pending)} tensors")
        if left:
            print(f"left behind: {', '.join(left)}")
        if options.verify:
            if format is None:
                proof = verify.verify(weights.of_run(folder), options.source, kept.origin["format"])
            else:
                proof = verify.verify(kept, folder, format)
            print(f"verified by {proof}")
    license = kept.origin.get("license")
    print(f"licence of the weights: {license or 'none was stated with them'}")
    print(f"wrote {options.out}: {', '.join(written)}")


def _image_size(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    sides = text.replace("x", ",").split(",")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise UsageError(f"--image-size={text} must be one number or two, as in 224 or 224,160")
    return tuple(int(side) for side in sides)
