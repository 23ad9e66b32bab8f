from vlmfast.cli import program

raise SystemExit(program())
