"""LLaVA's short-answer entry point under its own name: `llava answer`.

python -m llava.eval.model_vqa_loader --model-path M --question-file Q --image-folder I
"""

from llava.eval.answer_file import main

if __name__ == "__main__":
    raise SystemExit(main())
