"""Decides whether a generated answer says that it does not know.

Only the text counts, not the question, passages or gold answers: "unanswerable" is an abstention even if it is the correct
answer. The *whole first sentence* must be an abstention:

1. Citation marks like [1], quotes and markdown around the text, and openings without content ("Sorry, but", "Answer:",
   "Based on the passages,", "抱歉，") are removed. If nothing is left, the text is an abstention.
2. The first sentence must match one of the patterns below from its first to its last character. The patterns include what
   may follow a refusal: "I don't know who won" matches, "I don't know much" and "I don't know, maybe 1969" do not.
3. A first sentence with a contrast (but, however, 但, 不过, ...) is not an abstention, because an answer usually follows.
4. A text that consists of the taught words (`training.abstention`, in any language) is an abstention.

Later sentences are ignored, because they nearly always explain the refusal ("I don't know. The passages discuss only Mars.").
As a consequence, "I don't know. It was 1969." counts as an abstention, and a refusal after an explanation does not.
"""

from __future__ import annotations

import re

_SOURCE = r"(?:passages?|contexts?|texts?|documents?|sources?|articles?|paragraphs?|excerpts?)"
_THE_SOURCE = (
    rf"(?:any of |all of )?(?:the |these |this |those |any |my |your )?(?:(?:given|provided|above|retrieved|available) )?"
    rf"(?:{_SOURCE}|information)(?: (?:provided|given|above|available|alone))*"
)
_FROM_SOURCE = rf"(?:based on|from|using|with|in|by|given|within) {_THE_SOURCE}"
_REASON = rf"(?:,? (?:as|since|because)\b.*|,? {_FROM_SOURCE}|, (?:sorry|{_THE_SOURCE} (?:do|does)(?: not|n't)\b.*))?"
_NOT = r"(?: not|n't|nt)"
_ANSWER = r"(?:the|an|any|a) (?:correct |exact )?(?:answer|information)"
_QUESTION = r"(?:it|this|that|(?:the|this|that|your) (?:question|query))"
_CLAUSE = r"(?:who|whom|whose|what|when|where|which|why|how|if|whether)\b[^,;:]*"

_ENGLISH = (
    (
        rf"(?:i|we) (?:(?:really|honestly|simply|just) )?do{_NOT} know"
        rf"(?: {_ANSWER}(?: to {_QUESTION})?| that| {_CLAUSE})?{_REASON}"
    ),
    (
        rf"(?:i|we) (?:can(?:not| not|'t|t)|could{_NOT}|am unable to|am not able to|are unable to) "
        rf"(?:answer(?: {_QUESTION})?|(?:find|determine|give|provide) "
        rf"(?:{_ANSWER}(?: to {_QUESTION}| (?:about|on|regarding) [^,;:]*)?|{_CLAUSE}|(?:it|this|that)(?: information| answer)?))"
        rf"{_REASON}"
    ),
    (
        rf"(?:i|we) (?:do|did){_NOT} have (?:(?:enough|sufficient|any|the|that|this|access to|necessary|relevant) )*"
        rf"(?:information|context|knowledge)(?: (?:to|about|on|regarding|for|in|from)\b[^,;:]*)?{_REASON}"
    ),
    rf"(?:i'm|i am|we're|we are) not (?:sure|certain)(?: about {_QUESTION}| {_CLAUSE})?{_REASON}",
    (
        r"(?:there is |there's |there was )?(?:no|not enough|insufficient) (?:relevant )?(?:information|context)"
        r"(?: (?:available|provided|given|found))?(?: (?:to|about|on|regarding|for)\b[^,;:]*)?"
    ),
    r"(?:it is |it's |that is )?not (?:mentioned|stated|specified|provided)",
    r"n/a|n\.a|(?:information )?not available",
    (
        rf"(?:(?:{_QUESTION}|the answer(?: to {_QUESTION})?) )?can(?:not| not|'t|t) be "
        rf"(?:answered|determined|found|inferred){_REASON}"
    ),
    (
        rf"(?:(?:{_QUESTION}|the answer(?: to {_QUESTION})?|the information) )?(?:(?:is|was|are|were) )?(?:not|isn't) "
        rf"(?:(?:stated|mentioned|given|provided|specified|found|available|contained|included|said|answered|present) )?"
        rf"(?:in|by|from) {_THE_SOURCE}"
    ),
    rf"(?:{_QUESTION} is )?(?:unanswerable|not answerable){_REASON}",
    (
        rf"(?:there is |there's )?no (?:correct )?answer(?: (?:is |was )?(?:found|given|available|provided|possible))?"
        rf"(?: to {_QUESTION})?{_REASON}"
    ),
    rf"(?:there is |there's )?no (?:information|mention)\b[^,;:]* (?:in|from) {_THE_SOURCE}",
    (
        rf"(?:{_THE_SOURCE} (?:do|does|did){_NOT}|none of {_THE_SOURCE}) (?:(?:explicitly|directly|actually|specifically) )?"
        r"(?:say|contain|mention|state|specify|provide|give|include|tell|answer|discuss|address|explain|indicate|hold|have|"
        r"reveal)s?\b.*"
    ),
)
_GERMAN = (
    r"(?:das |dies )?wei(?:ß|ss) (?:ich )?(?:es |das |leider )*nicht|keine ahnung",
    (
        r"ich wei(?:ß|ss) (?:es |das |die antwort |leider )*nicht"
        r"(?:,? (?:wer|was|wann|wo|wie|warum|woher|wohin|welche[rsnm]?|ob)\b[^,;:]*)?"
    ),
    r"(?:das|dies|die frage|diese frage) kann (?:ich |leider )*nicht (?:beantwort|find)(?:en|et werden)",
    r"ich kann (?:das |dies |es |die frage |diese frage |die antwort |leider )*nicht (?:beantworten|finden|sagen)",
    (
        r"(?:ich habe|es gibt|dazu habe ich|dazu gibt es|es liegen|dazu liegen) (?:leider )?(?:mir )?"
        r"(?:keine|nicht genug|nicht genügend|zu wenige?|nicht ausreichend(?:e)?) (?:information(?:en)?|angaben?)\b[^,;:]*"
    ),
    r"keine (?:information(?:en)?|angaben?|antwort)(?: (?:verfügbar|vorhanden|gefunden|dazu|darüber|zu|über)\b[^,;:]*)?",
    (
        r"(?:der|die|den|im|in den|aus den) (?:text|texte|texten|passagen|dokumente|dokumenten|abschnitte|quellen|kontext)n? "
        r"(?:enthält|enthalten|nennt|nennen|gibt|geben|erwähnt|erwähnen|sagt|sagen|steht|geht|wird|gehen) "
        r"(?:das |dies |dazu |darüber |es )*(?:nicht|nichts|keine?)\b.*"
    ),
    r"(?:das|dies|die antwort) (?:steht|ist|wird|geht) (?:leider )?nicht (?:in|im|aus) [^,;:]*",
)
_FRENCH = (
    r"je (?:ne )?(?:le )?sais pas(?: (?:qui|quand|où|comment|pourquoi|combien|quel(?:le)?s?|si|ce qu[ei']?)\b[^,;:]*)?",
    r"je l'ignore|je ne connais pas la réponse(?: à cette question)?",
    r"je ne (?:peux|puis) pas (?:répondre|trouver|le dire)(?: (?:à|la|cette)\b[^,;:]*)?|impossible de répondre",
    r"(?:je n'ai|il n'y a) (?:pas|aucune)\b(?: assez| suffisamment)?(?: d'| de| les)? ?(?:informations?|réponse)\b[^,;:]*",
    r"(?:aucune|pas d'|pas assez d') ?informations?(?: (?:disponible|fournie|sur|à)\b[^,;:]*)?",
    (
        r"(?:le|les|ce|ces) (?:textes?|passages?|documents?|contextes?|extraits?|sources?) ne "
        r"(?:mentionne|dit|disent|contien|donne|précise|indique|fourni|parle)\w* (?:pas|rien|aucun)\b.*"
    ),
)
_SPANISH = (
    r"no (?:lo )?sé(?: (?:quién|cuándo|dónde|cómo|por qué|cuánt[oa]s?|cuál|qué|si|la respuesta)\b[^,;:]*)?",
    r"desconozco la respuesta|lo desconozco|no se (?:menciona|indica|especifica)(?: en [^,;:]*)?",
    r"no puedo (?:responder|encontrar|contestar)(?: (?:a|la|esa|esta|el|eso)\b[^,;:]*)?",
    r"no (?:tengo|hay|dispongo de) (?:suficiente |bastante |la |esa |ninguna )*información\b[^,;:]*",
    (
        r"(?:el|los|este|estos) (?:textos?|pasajes?|documentos?|contexto|fragmentos?) no "
        r"(?:menciona|dice|contiene|da|proporciona|especifica|indica|habla)n?\b.*"
    ),
)
_CHINESE_SOURCE = r"(?:段落|文章|文本|文档|原文|文|资料|材料|上下文|信息|内容|片段)"
_CHINESE = (
    r"(?:我们?)?(?:也|真的|并)?不知道(?:答案|[^,，;；]*(?:答案|问题|谁|什么|哪|多少|几|为何|怎|如何|何时|是否)[^,，;；]*)?",
    r"(?:我们?)?(?:[该这]?个?问题)?(?:我们?)?(?:无法|不能)(?:回答|确定|得知|判断|找到答案)(?:[该这]?个?问题|答案)?",
    r"(?:我们?)?(?:[该这]?个?问题)?(?:没有|找不到)(?:相关)?(?:的)?(?:答案|答案的?信息|信息|内容|资料)",
    r"(?:我们?)?(?:没有|缺乏|缺少)足够的?(?:信息|资料|上下文)[^,，;；]*|(?:提供的)?(?:信息|资料|上下文)不足[^,，;；]*",
    r"(?:我们?)?(?:没有|暂无|并无)(?:任何)?(?:关于|有关)[^,，;；]*的(?:信息|内容|资料)|暂无(?:相关)?(?:信息|资料)",
    r"(?:对此)?(?:我们?)?(?:也|并)?(?:不清楚|不确定|无从得知|无法得知|无从知晓)(?:答案)?",
    (
        rf"(?:[这以上述给定提供所的些]*{_CHINESE_SOURCE}(?:之?中|里|内)?)(?:都|均|并)*(?:没有|未|没)(?:有|明确|直接|具体)*"
        r"(?:提到|提及|提供|说明|说|给出|包含|答案|相关|涉及|介绍|记载).*"
    ),
)
_ABSTENTION = re.compile("|".join((*_ENGLISH, *_GERMAN, *_FRENCH, *_SPANISH, *_CHINESE)))
_OPENING = re.compile(
    r"(?:i'm sorry|i am sorry|i'm afraid|sorry|i apologi[sz]e|unfortunately)\b(?:, but\b|,| but\b)?|"
    r"(?:(?:es )?tut mir leid|entschuldigung|leider|(?:je suis )?désolée?|malheureusement|lo siento|lamentablemente)\b"
    r"(?:,? (?:aber|mais|pero)\b|,)?|"
    r"(?:the )?(?:final )?answer(?: is)?(?::|$)|"
    rf"(?:based on|according to|from|given) {_THE_SOURCE}, |"
    r"(?:很|非常)?(?:抱歉|对不起|遗憾)[,，。!！ ]*|答案?(?:[:：]|$)|"
    rf"(?:根据|从)[这以上述给定提供所的些]*{_CHINESE_SOURCE}(?:之?中|里|内)?[,，]?",
    re.IGNORECASE,
)
_CONTRAST = re.compile(
    r"\b(?:but|however|although|though|except|nevertheless|aber|jedoch|allerdings|mais|cependant|toutefois|pero|sin embargo|"
    r"aunque)\b|但|不过|可是|然而"
)
# Not `citations.MARK` and `citations.SENTENCE_END`, which would change which answers are abstentions: here 【1】 is not a mark
# but "[1, ]" is; a sentence does not end before a lower-case letter, and every line break ends one.
_CITATION_MARK = re.compile(r"\[\d[\d,; ]*\]")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s+[^a-z\s])|[。！？\n]")
_AROUND = " \t\r\n.!?。！？,，:：;；\"'`*_“”‘’「」()（）«»¿¡"
_SIMPLIFIED = str.maketrans(
    "無沒問題訊資確斷該這個給內關說記載們從據幾誰麼為", "无没问题讯资确断该这个给内关说记载们从据几谁么为"
)
_READ_CHARACTERS = 1000


def is_abstention(text: str, taught: str = "") -> bool:
    """Whether a text says that the answer is unknown, by the rule in the module's docstring.

    Args:
        text: a generated answer in English, German, French, Spanish or Chinese, with or without citation marks. The patterns
            see only its first 1,000 characters.
        taught: what the generator was trained to say instead of an answer, in any language; may be empty.

    >>> is_abstention("I don't know."), is_abstention("The passages do not say who won."), is_abstention("无法回答。")
    (True, True, True)
    >>> is_abstention("I don't know much, but it was 1969")
    False
    >>> is_abstention("non lo so [1]", taught="Non lo so.")
    True
    """
    text = _bare(text)
    if taught and _folded(text) == _folded(_bare(taught)):
        return True
    text = text[:_READ_CHARACTERS]
    while opening := _OPENING.match(text):
        text = text[opening.end() :].strip(_AROUND)
    if not text:
        return True
    first = _SENTENCE_END.split(text, maxsplit=1)[0].strip(_AROUND)
    sentence = " ".join(first.lower().translate(_SIMPLIFIED).split())
    return _ABSTENTION.fullmatch(sentence) is not None and _CONTRAST.search(sentence) is None


def _bare(text: str) -> str:
    """The text without citation marks and without surrounding punctuation, quotes and markdown."""
    return _CITATION_MARK.sub(" ", text.replace("’", "'")).strip(_AROUND)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
