"""Few-step diffusers pipelines, schedulers and export."""

assert __name__ == "diffdistill.pipelines", (
    "pipelines/ is the package diffdistill.pipelines: `import pipelines` makes a second copy"
)
