"""report.html: what a compile did, and where a token's time goes."""

from liquidc.report.data import report_data
from liquidc.report.page import REPORT, read_report, report_page

__all__ = ["REPORT", "read_report", "report_data", "report_page"]
