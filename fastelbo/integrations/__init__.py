"""fastelbo inside of other packages: one module for each, which imports that package."""
