from viommu.cli import app

app()
