"""The tasks: one run per document, one per section of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import BaseModel

from brokertask import App, Context, Retry
from workers.documents.text import keywords, split
from workers.documents.upstream import Request, UpstreamBusy, UpstreamError, fetch, summary_of

app = App("documents")

SOON: Final = Retry(max_attempts=8, min_delay=0.1, max_delay=1, on=UpstreamBusy)
"""Within the step: the run keeps its slot, as it is only for a moment."""
LATER: Final = Retry(
    max_attempts=5, factor=2, min_delay=1, max_delay=60, on=(UpstreamError, TimeoutError)
)
"""The whole attempt: the run waits on the broker, and its slot is free for others."""


class Document(BaseModel):
    """A document to process."""

    path: Path


class Section(BaseModel):
    """One part of a document."""

    path: Path
    number: int
    text: str


class DocumentReport(BaseModel):
    """What became of a document; its sections are runs of their own."""

    path: Path
    words: int
    summary: str
    sections: list[str]
    """The run ids of its sections."""


class SectionReport(BaseModel):
    """What one section is about."""

    path: Path
    number: int
    words: int
    keywords: list[str]


@app.task(retry=LATER, concurrency=5, timeout=300)
async def process_document(document: Document, ctx: Context) -> DocumentReport:
    """Fetch, summarise and split a document, and ask for a run for each of its sections.

    Whatever happens in between, each step is done once: a retry, or another worker after a crash,
    goes on behind those that are finished.
    """
    request = Request(ctx.run_id, ctx.attempt)
    text = await ctx.step("fetch", fetch, document.path, request)
    summary = await ctx.step("summarise", summary_of, text, request, retry=SOON, timeout="30s")
    parts = await ctx.step("split", split, text)
    sections = await ctx.step("fan out", fan_out, document.path, parts)
    ctx.log.info("fanned out into %d sections", len(sections))
    return DocumentReport(
        path=document.path, words=len(text.split()), summary=summary, sections=sections
    )


async def fan_out(path: Path, parts: list[str]) -> list[str]:
    """Ask for a run for each section, and return their ids."""
    sections = [Section(path=path, number=n, text=part) for n, part in enumerate(parts, start=1)]
    return [run.run_id for run in await process_section.trigger_many(sections)]


@app.task(concurrency=20, timeout="1m")
def process_section(section: Section) -> SectionReport:
    """Find out what a section is about. Plain synchronous code: it runs in a thread."""
    return SectionReport(
        path=section.path,
        number=section.number,
        words=len(section.text.split()),
        keywords=keywords(section.text),
    )
