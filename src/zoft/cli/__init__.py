"""The command line: ``zoft COMMAND``. One module a command; each imports what is slow only when it runs."""

from __future__ import annotations

import errno
import logging
import os
import sys

import typer

from zoft.cli.align import align
from zoft.cli.bench import bench
from zoft.cli.demo import demo
from zoft.cli.doctor import doctor
from zoft.cli.eval import evaluate
from zoft.cli.export import export
from zoft.cli.methods import methods
from zoft.cli.replay import replay
from zoft.cli.report import report
from zoft.cli.tasks import tasks
from zoft.cli.train import train
from zoft.errors import UserError

BACKENDS = ("torchao", "bitsandbytes", "torch.utils._pytree")  # PEFT imports them, where they are, and they talk

# On the CPU, torch's library for half precision compiles a product for every number of tokens that a batch may have, in
# half a millisecond, and keeps the last 1024, of which a step needs ten: a run would hold 60 MiB more after 200 steps.
PRODUCTS_KEPT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64"

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
UNWRITABLE |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # of an accelerator's, of CPUs' allocators

app = typer.Typer(
    name="zoft",
    help="Fine-tune language models with forward passes only: the memory of inference, no backpropagation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(train)
app.command(name="eval")(evaluate)
app.command()(align)
app.add_typer(bench, name="bench")
app.command()(doctor)
app.command()(export)
app.command()(replay)
app.command()(demo)
app.command()(report)
app.command()(methods)
app.command()(tasks)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    for name in BACKENDS:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault(*PRODUCTS_KEPT)  # before torch is there
    try:
        app()
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        fail(f"cannot write {error.filename or 'a file'}: {error.strerror}")
    except Exception as error:
        if isinstance(error, MemoryError) or any(said in str(error) for said in NO_MEMORY):
            fail("the memory is full: lower --batch-size, --eval-batch-size or --max-length, or see --memory")
        full = os.strerror(errno.ENOSPC)  # the writers of weights have exceptions of their own for it
        if full not in str(error):
            raise
        fail(f"cannot write a file: {full}")


def fail(message: str) -> None:
    """Say `message`, in one line, on standard error and exit with code 2."""
    print(f"zoft: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
