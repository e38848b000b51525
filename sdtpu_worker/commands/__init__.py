"""The commands of `sdtpu` that ask the queue; `sdtpu_worker.cli` puts them under one name. Each is light to import."""
