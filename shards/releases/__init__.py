"""The data sets, a module each: its `release(…)` lists the images and yields a `Release`.

To add one, write a module beside these (`folder` is the shortest, `rafdb` one with a list of its
own), then name it in `RELEASES` and give it a case in `_listed` of shards/pack.py. A module
lists `Item`s with the help of `source` (files that do not lead out of the folder, lines of lists,
keys, counts beside the official ones) and names in `left_out` each image that it does not pack.
`similarity` aligns a face by its landmarks; `drawing` draws the faces of `synthetic`, the demo.
"""
