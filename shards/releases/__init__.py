"""The data sets, a module each: its `release(…)` lists the images and yields a `Release`.

To add one, write a module beside these (`folder` is the shortest, `rafdb` one with a list of its
own), then give it a sub-command in `_parser` and a case in `_release` of shards/pack.py. A module
lists `Item`s with the help of `source` (files that do not lead out of the folder, lines of lists,
keys, counts beside the official ones) and names in `left_out` each image that it does not pack.
`similarity` aligns a face by its landmarks; `drawing` draws the faces of `synthetic`, the demo.
"""
