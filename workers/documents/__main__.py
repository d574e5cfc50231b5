"""`python -m workers.documents`: the whole job over a folder of text; see `make demo`."""

from workers.documents.demo import main

main()
