"""Numbers and names as people read them."""

SHARES = ("accuracy", "exact_match", "f1", "number_match")  # metrics from 0 to 1


def words(name: str) -> str:
    """An identifier as words."""
    return name.replace("_", " ")


def number(value: float) -> str:
    """A count with thousands separated, or three significant digits."""
    if value == int(value):
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.3g}"


def score(metric: str, value: float) -> str:
    """A metric's value: a share as a percentage, others as they are."""
    return f"{value:.1%}" if metric in SHARES else f"{value:.3f}"


def change(metric: str, difference: float) -> str:
    """The difference of two values of a metric."""
    return f"{100 * difference:+.1f} points" if metric in SHARES else f"{difference:+.3f}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that they fill."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """A number of bytes."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
