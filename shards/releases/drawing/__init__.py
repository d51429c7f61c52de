"""The demo's faces, drawn: a face is a function of (seed, index, expression, person)."""
