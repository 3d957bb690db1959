"""Metrics, speed, benchmark and report. Import as `import diffdistill.eval as ...`: `eval` is a builtin."""

assert __name__ == "diffdistill.eval", "eval/ is the package diffdistill.eval: `import eval` makes a second copy"
