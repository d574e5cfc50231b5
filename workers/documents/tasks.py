"""The tasks: one run per document, one per section of it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from brokertask import Abort, App, Context, Retry
from workers.documents.text import keywords, split
from workers.documents.upstream import UpstreamUnavailable, summary_of

app = App("documents")


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


@app.task(
    retry=Retry(max_attempts=5, factor=2, min_delay=1, max_delay=60, on=UpstreamUnavailable),
    concurrency=5,
    timeout=300,
)
async def process_document(document: Document, ctx: Context) -> DocumentReport:
    """Fetch, summarise and split a document, and ask for a run for each of its sections."""
    text = fetch(document.path)
    summary = await summary_of(text, attempt=ctx.attempt)
    parts = [
        Section(path=document.path, number=number, text=part)
        for number, part in enumerate(split(text), start=1)
    ]
    sections = await process_section.trigger_many(parts)
    ctx.log.info("fanned out into %d sections", len(sections))
    return DocumentReport(
        path=document.path,
        words=len(text.split()),
        summary=summary,
        sections=[section.run_id for section in sections],
    )


@app.task(concurrency=20, timeout="1m")
def process_section(section: Section) -> SectionReport:
    """Find out what a section is about. Plain synchronous code: it runs in a thread."""
    return SectionReport(
        path=section.path,
        number=section.number,
        words=len(section.text.split()),
        keywords=keywords(section.text),
    )


def fetch(path: Path) -> str:
    """Return the text of a document; a retry does not help one that is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Abort(f"{path.name} is not text: {error.reason} at byte {error.start}") from error
