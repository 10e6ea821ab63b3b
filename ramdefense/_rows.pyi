STREAM_BYTES: int

def bound(
    scores: int,
    numbers: int,
    factors: int,
    spare: int,
    stream: int,
    drop_level: int,
    rows: int,
    keys: int,
    max_attention: float,
    multiple: bool,
    masked: bool,
    cap: bool,
    /,
) -> bool: ...
def pull(
    scores: int,
    slopes: int,
    numbers: int,
    spare: int,
    stream: int,
    drop_level: int,
    rows: int,
    keys: int,
    cap: bool,
    straight_through: bool,
    /,
) -> None: ...
def seed(stream: int, seed: int, /) -> None: ...
def read(stream: int, kept: int, count: int, drop_level: int, /) -> None: ...
