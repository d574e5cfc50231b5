"""The documents pipeline: fetch, summarise and split each document, then one run per section.

brokertask worker workers.documents:app      # the worker
make demo                                    # the whole job, and a worker killed half-way
"""

from workers.documents.tasks import app

__all__ = ["app"]
