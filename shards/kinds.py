"""What a file is, by its first bytes, where it is no picture; and what its owner can do."""

HEAD_BYTES = 64
ONNX, ZIP = "an ONNX network", "a zip archive"

_SIGNATURES = {  # where a file begins so: what it is
    b"\x00\x05\x16\x07": "an AppleDouble file, which macOS writes beside others",
    b"%PDF": "a PDF; export its pages as images",
    b"%!PS": "PostScript; export it as an image",
    b"8BPS": "a Photoshop file; export it as an image",
    b"<svg": "an SVG drawing; export it as an image",
    b"\x1aE\xdf\xa3": "a video (Matroska or WebM); extract its frames, by ffmpeg for one",
    b"FLV\x01": "a video (Flash); extract its frames, by ffmpeg for one",
    b"\x00\x00\x01\xba": "a video (MPEG); extract its frames, by ffmpeg for one",
    b"\x00\x00\x01\xb3": "a video (MPEG); extract its frames, by ffmpeg for one",
    b"0&\xb2u\x8ef\xcf\x11": "a video (Windows Media); extract its frames, by ffmpeg for one",
    b"ID3": "sound",
    b"PK\x03\x04": f"{ZIP} or a checkpoint; an archive is unpacked first",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ": "an xz archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"\x93NUMPY": "a NumPy array; save its pictures as image files",
    b"\x89HDF": "an HDF5 file; save its pictures as image files",
    b"MATLAB 5": "a MATLAB file; save its pictures as image files",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a Git LFS pointer; git lfs pull brings the file",
    b"\x7fELF": "a program",
    b"#!": "a script",
    b"{": "JSON",
}
_BRANDS = {  # of an ISO base media file that is no picture
    b"qt  ": "a video (QuickTime); extract its frames, by ffmpeg for one",
    b"M4A ": "sound",
}
_STARTS = (  # of pictures; BMP's and PPM's two letters are too few to tell a file by
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*",
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51",
)  # fmt: skip
_PICTURES = {  # of such a file that is one
    "HEIC": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"),
    "AVIF": (b"avif", b"avis"),
}


def describe(head: bytes, name: str = "") -> str | None:
    """What a file of these first bytes is, and what to do, in words; None: not known.

    name: of the file, by which what has no signature is told.
    """
    if head[4:8] == b"ftyp":
        if form := media_picture(head):
            return f"a picture in {form}" + (", which Pillow reads from 11.3 on" * (form == "AVIF"))
        video = "a video (MP4 and the like); extract its frames, by ffmpeg for one"
        return _BRANDS.get(head[8:12], video)
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WAVE"):
        is_video = head[8:12] == b"AVI "
        return "a video (AVI); extract its frames, by ffmpeg for one" if is_video else "sound"
    if is_onnx(head, name):
        return ONNX
    start = head.lstrip()
    if start[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, as a failed download leaves it"
    return next((kind for sign, kind in _SIGNATURES.items() if start.startswith(sign)), None)


def begins_as_picture(head: bytes) -> bool:
    """Whether a file begins as a picture of a format that is read."""
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return is_webp or media_picture(head) is not None or head.startswith(_STARTS)


def is_onnx(head: bytes, name: str) -> bool:
    """A protobuf of ONNX begins with its version and the name of the program that wrote it."""
    return head[:1] == b"\x08" and (
        name.lower().endswith(".onnx") or head[2:3] in (b"\x12", b"\x1a")
    )


def media_picture(head: bytes) -> str | None:
    """HEIC or AVIF, of a file in the container that videos have as well."""
    if head[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(head[:4], "big"), HEAD_BYTES)
    brands = {head[8:12], *(head[k : k + 4] for k in range(16, end, 4))}
    found = [form for form, own in _PICTURES.items() if brands.intersection(own)]
    if not found and head[8:12] in (b"mif1", b"msf1"):
        return "HEIC"
    return found[-1] if found else None  # AVIF, where a file claims both
