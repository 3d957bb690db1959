"""One file per distillation method; a method is found by its module's name."""

assert __name__ == "diffdistill.methods", (
    "methods/ is the package diffdistill.methods: `import methods` makes a second copy"
)
