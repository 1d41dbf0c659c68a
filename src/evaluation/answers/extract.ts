// Finding the final answer in what a model wrote: after its thinking, in the last \boxed{…}, or where it is announced.

/** What follows the model's thinking; undefined when the thinking never ends. */
export function afterThinking(text: string): string | undefined {
  const end = text.lastIndexOf('</think>');
  if (end >= 0) return text.slice(end + '</think>'.length);
  return text.includes('<think>') ? undefined : text;
}

/** Content of the last \boxed{…} or \fbox{…} that is closed, braces balanced. */
export function lastBoxed(text: string): string | undefined {
  for (let at = text.length; at >= 0;) {
    const found = Math.max(text.lastIndexOf('\\boxed', at), text.lastIndexOf('\\fbox', at));
    if (found < 0) return undefined;
    at = found - 1;
    const open = /^\\f?boxed\s*\{|^\\fbox\s*\{/.exec(text.slice(found, found + 40));
    if (!open) {
      // \boxed 5: one character without braces.
      const bare = /^\\boxed\s+(\S+)/.exec(text.slice(found, found + 40));
      if (bare) return bare[1].replace(/[$.]+$/, '');
      continue;
    }
    const begin = found + open[0].length;
    let depth = 1;
    for (let i = begin; i < text.length; i++) {
      if (text[i] === '\\') i++;
      else if (text[i] === '{') depth++;
      else if (text[i] === '}' && --depth === 0) return text.slice(begin, i).trim();
    }
    if (at < 0) return undefined;
  }
  return undefined;
}

/** What follows the last announcement, to the end of its sentence. */
function announced(text: string): string | undefined {
  const marks = [...text.matchAll(/(?:answer|result)\s*(?:is|:|=)\s*\**\s*:?\s*|####\s*/gi)];
  for (const mark of marks.reverse()) {
    const rest = text.slice(mark.index + mark[0].length).split('\n')[0];
    const math = /^\s*(?:\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\])/.exec(rest);
    const answer = (math?.[1] ?? math?.[2] ?? math?.[3] ?? rest.split(/\.(?:\s|$)|\*\*/)[0]).trim();
    if (answer !== '') return answer;
  }
  return undefined;
}

/** The last number in a text, thousands separators and sign included. */
export function lastNumber(text: string): string | undefined {
  const found = text.match(/-?\$?\d[\d,]*(?:\.\d+)?(?:\/\d+)?/g)?.at(-1);
  return found?.replace('$', '').replace(/,$/, '');
}

/** The final answer to a question of mathematics, or undefined. */
export function extractMath(text: string): string | undefined {
  const said = afterThinking(text);
  if (said === undefined) return undefined;
  return lastBoxed(said) ?? announced(said) ?? lastNumber(said);
}

/** What may stand between an announcement and its letter: markdown, brackets, LaTeX. */
const WRAPPED = String.raw`(?:[*$(\[{"'\s]|\\\(|\\(?:text|textbf|mathrm|mathbf|boxed|fbox)\s*\{)*`;

/**
 * Announcements of a choice, the most telling first. "Answer: C" is what questions ask for; "option C" alone may be one
 * that is being weighed.
 */
const LETTER_MARKS = [
  String.raw`(?:[Aa]nswer|ANSWER)\**\s*(?:is|:|=)\s*:?`,
  String.raw`(?:[Cc]hoice|[Oo]ption)\**\s*(?:is|:|=)\s*:?`,
  String.raw`(?:[Aa]nswer|[Cc]hoice|[Oo]ption)\s`,
] as const;

/** The letter of the final choice, upper case, or undefined. @param letters those there are, e.g. `ABCD`. */
export function extractLetter(text: string, letters: string): string | undefined {
  const said = afterThinking(text);
  if (said === undefined) return undefined;
  // \boxed{\text{(C)}}, \boxed{C. an apple}.
  const bare = lastBoxed(said)?.replaceAll(/\\(?:text|textbf|mathrm|mathbf)\s*\{|[{}$()*\s]/g, '');
  const boxed = bare && new RegExp(`^([${letters}])(?![A-Za-z])`, 'i').exec(bare)?.[1];
  if (boxed) return boxed.toUpperCase();
  // A small letter counts only where nothing follows: "the answer is a large number" names no choice.
  const letter = `(?:([${letters}])(?![A-Za-z])|([${letters.toLowerCase()}])(?=[).*$}\\]"']|\\s*$))`;
  for (const mark of LETTER_MARKS) {
    const found = [...said.matchAll(new RegExp(mark + WRAPPED + letter, 'gm'))].at(-1);
    if (found) return (found[1] ?? found[2]).toUpperCase();
  }
  return new RegExp(`(?:^|\\n)\\s*[*$(]*([${letters}])[*$).]*\\s*$`).exec(said.trimEnd())?.[1];
}
