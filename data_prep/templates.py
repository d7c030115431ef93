"""Templates that turn a record of a jsonl or parquet source into a prompt; the answer is the record's target field.

`{field}` stands for a field of the record. A source entry names one of these, or writes its own:

    data.sources=[{path: news.jsonl, template: summary_zh}, {path: qa.jsonl, template: 'Q: {question}\\nA:'}]
"""

import string
from typing import Any

from data_prep.errors import ConfigError

TEMPLATES = {
    "plain": "{text}",
    "summary_zh": "{text}\n\n用一句话概括上文：",
    "summary_en": "{text}\n\nIn one sentence, this says:",
    "title_zh": "{text}\n\n给上文拟一个标题：",
    "title_en": "{text}\n\nA title for this text:",
    "question_zh": "{text}\n\n问题：{question}\n回答：",
    "question_en": "{text}\n\nQuestion: {question}\nAnswer:",
    "sentiment_zh": "评论：{text}\n这条评论的态度是",
    "sentiment_en": "Review: {text}\nThe attitude of this review is",
    "entailment_zh": "前提：{premise}\n假设：{hypothesis}\n两句话的关系（蕴含、矛盾或无关）是",
    "entailment_en": "Premise: {premise}\nHypothesis: {hypothesis}\nEntailment, contradiction or neutral:",
    "translation_zh_en": "把下面的中文译成英文。\n{text}\n译文：",
    "translation_en_zh": "Translate into Chinese.\n{text}\nTranslation:",
    "chat": "[Round 0]\n问：{text}\n答：",
    "chat2": "[Round 1]\n\n问：{text}\n\n答：",
}
"""Prompts by name; chat is the format of ChatGLM-6B's single turn, chat2 of ChatGLM2-6B's."""


def fields_of(template: str) -> list[str]:
    """Names of the fields that a template, given by name or written out, takes from a record.

    Raises ConfigError for a name that is not known or a text that is no template.
    """
    text = TEMPLATES.get(template, template)
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ConfigError(f"data.sources: template={template!r} cannot be read ({error})") from error
    if not names or not all(name.isidentifier() for name in names):
        raise ConfigError(
            f"data.sources: template={template!r} must be one of {', '.join(TEMPLATES)}, "
            "or a text with fields in braces, such as 'Q: {question} A:'"
        )
    return names


def render(template: str, fields: dict[str, Any]) -> str:
    """The prompt of a record that holds every field of the template."""
    return TEMPLATES.get(template, template).format_map(fields)
