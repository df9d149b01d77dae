"""The report of `capt-eval --report`: one page, and its figures as Markdown and JSON."""

from capt_deploy.report.write import check_folder, write_report

__all__ = ["check_folder", "write_report"]
