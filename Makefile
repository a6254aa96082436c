# make quickstart   train both stages on synthetic flowers and draw a grid of classes, in minutes on a CPU
# make test         run the quick tests on up to 4 cores; for the others: .venv/bin/python -m pytest -m slow (or gpu)
# make lint         run ruff's checks and check the formatting; it changes nothing
#
# Each target sets up .venv the first time, and again when requirements.txt or pyproject.toml change. Only that needs
# the network. To use another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
INSTALLED := .venv/.installed

.PHONY: quickstart test lint

quickstart: $(INSTALLED)
	@set -e; \
	number=1; while [ -e results/quickstart-$$number ]; do number=$$((number + 1)); done; \
	run=results/quickstart-$$number; \
	.venv/bin/python train_autoencoder.py --config configs/quickstart.yaml --output_dir $$run/autoencoder; \
	.venv/bin/python train_latent_diffusion.py --config configs/quickstart.yaml \
		--autoencoder $$run/autoencoder --output_dir $$run/flower-ldm; \
	.venv/bin/python -m flower_ldm.sample --pipeline $$run/flower-ldm --num_images 8 --output $$run/pictures; \
	echo; \
	echo "Flowers that your model drew, one class a column:  $$run/pictures/grid.png"; \
	echo "How it learned to draw them:                       $$run/flower-ldm/samples"; \
	echo "Flowers that the autoencoder reconstructed:        $$run/autoencoder/reconstructions"; \
	echo "The pipeline, FlowerLDMPipeline.from_pretrained:   $$run/flower-ldm"

test: $(INSTALLED)
	.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --editable ".[dev]"
	touch $@
