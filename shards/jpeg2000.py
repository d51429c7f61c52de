"""JPEG 2000: whether the tiles that a header announces are there; decoders fill up what is not."""

_START, _TILE_PART, _END = b"\xff\x4f\xff\x51", b"\xff\x90", b"\xff\xd9"


def check_tiles(data: bytes) -> None:
    """ValueError: fewer tiles than the header's size asks for."""
    start = data.find(_START)

    def number(at: int, size: int = 4) -> int:
        return int.from_bytes(data[at : at + size], "big")

    if start < 0:
        raise ValueError("cannot be decoded: a JPEG 2000 without a codestream")
    size = start + 8  # of the picture on the grid, its offset, a tile's size, the first's offset
    width, height, _, _, tile_width, tile_height, tile_x, tile_y = (
        number(size + 4 * k) for k in range(8)
    )
    if not tile_width or not tile_height:
        raise ValueError("cannot be decoded: a JPEG 2000 whose tiles have no size")
    wanted = -((tile_x - width) // tile_width) * -((tile_y - height) // tile_height)
    at = start + 2
    while data[at : at + 1] == b"\xff" and data[at : at + 2] != _TILE_PART:  # the main header
        at += 2 + number(at + 2, 2)
    found = set()
    while data[at : at + 2] == _TILE_PART and (length := number(at + 6)) != 0:
        found.add(number(at + 4, 2))
        at += length
    if data[at : at + 2] == _TILE_PART:  # the last one, which goes on to the end
        found.add(number(at + 4, 2))
    if len(found) < wanted:
        raise ValueError(f"cannot be decoded: {len(found)} of its {wanted} tiles are there")
