"""The page that shows what `kvc eval` found: one file of HTML that needs only a browser."""

from kvc.measure.report_page.page import write_report

__all__ = ["write_report"]
