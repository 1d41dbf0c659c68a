// The arithmetic of answers: sums, products, powers, fractions, roots and functions, by recursive descent over tokens.
import { exact, parseRational, type Expression, type FunctionName } from './expression.js';
import { is, isCommand, type Token } from './tokens.js';

/** An expression with what stands behind it. */
export interface Quantity {
  readonly node: Expression;
  /** Words after it, lower case, e.g. `cm^2`; null without. */
  readonly unit: string | null;
  readonly percent: boolean;
}

/** Thrown by the parsers: this is not what the grammar knows. */
export class NotMathematics extends Error {}

/** Opening brackets and what closes them. */
export const CLOSING: Readonly<Record<string, string>> = {
  '(': ')',
  '[': ']',
  '{': '}',
  '\\{': '\\}',
  langle: 'rangle',
};

/** Depth of nesting at most: answers come from outside. */
export const MAX_DEPTH = 60;

/** Reads tokens as one expression, to their end. @throws NotMathematics */
export function parseExpression(tokens: readonly Token[]): Quantity {
  return new ExpressionParser(tokens).whole();
}

const integer = (n: number): Expression => ({ kind: 'number', value: { n: BigInt(n), d: 1n } });
const binary = (op: '+' | '-' | '*' | '/' | '^', left: Expression, right: Expression): Expression => ({
  kind: 'binary',
  op,
  left,
  right,
});
const call = (name: FunctionName, ...args: Expression[]): Expression => ({ kind: 'call', name, args });

const SIMPLE_FUNCTIONS = new Set([
  'sin',
  'cos',
  'tan',
  'cot',
  'sec',
  'csc',
  'arcsin',
  'arccos',
  'arctan',
  'ln',
  'exp',
  'abs',
]);
const INVERSES: Readonly<Record<string, FunctionName>> = { sin: 'arcsin', cos: 'arccos', tan: 'arctan' };

/** Recursive descent over the tokens of one expression. */
class ExpressionParser {
  readonly #tokens: Token[];
  #at = 0;
  #depth = 0;
  /** Inside |…| a bar closes. */
  #bars = 0;

  constructor(tokens: readonly Token[]) {
    this.#tokens = [...tokens];
  }

  /** The expression with what stands behind it: a unit, a percent sign. */
  whole(): Quantity {
    const node = this.#sum();
    let percent = false;
    if (is(this.#peek(), '%')) {
      percent = true;
      this.#at++;
    }
    const rest = this.#tokens.slice(this.#at);
    if (rest.length === 0) return { node, unit: null, percent };
    if (rest[0].type !== 'words') throw new NotMathematics();
    const plain = rest.every(
      (token) => token.type !== 'command' && (token.type !== 'sign' || /^[\^/{}.()-]$/.test(token.text)),
    );
    if (!plain) throw new NotMathematics();
    const text = rest
      .map(({ text }) => text)
      .join(' ')
      .toLowerCase();
    if (/^percent/.test(text)) return { node, unit: null, percent: true };
    return { node, unit: text, percent };
  }

  #peek(ahead = 0): Token | undefined {
    return this.#tokens[this.#at + ahead];
  }

  #next(): Token {
    const token = this.#peek();
    if (!token) throw new NotMathematics();
    this.#at++;
    return token;
  }

  #expect(sign: string): void {
    if (!is(this.#next(), sign)) throw new NotMathematics();
  }

  #sum(): Expression {
    if (++this.#depth > MAX_DEPTH) throw new NotMathematics();
    let node = this.#signed();
    for (;;) {
      const token = this.#peek();
      if (is(token, '+') || is(token, '-')) {
        this.#at++;
        node = binary(is(token, '+') ? '+' : '-', node, this.#product());
      } else break;
    }
    this.#depth--;
    return node;
  }

  #signed(): Expression {
    if (is(this.#peek(), '-')) {
      this.#at++;
      return binary('-', integer(0), this.#signedProduct());
    }
    if (is(this.#peek(), '+')) {
      this.#at++;
      return this.#signedProduct();
    }
    return this.#product();
  }

  #signedProduct(): Expression {
    if (is(this.#peek(), '-') || is(this.#peek(), '+')) throw new NotMathematics();
    return this.#product();
  }

  #product(): Expression {
    let node = this.#factor();
    for (;;) {
      const token = this.#peek();
      if (is(token, '*') || isCommand(token, 'cdot') || isCommand(token, 'times')) {
        this.#at++;
        node = binary('*', node, this.#factor());
      } else if (is(token, '/') || isCommand(token, 'div')) {
        this.#at++;
        node = binary('/', node, this.#factor());
      } else if (this.#startsFactor(token)) {
        // Two numbers side by side are no product.
        if (token?.type === 'number' && this.#tokens[this.#at - 1].type === 'number') throw new NotMathematics();
        node = binary('*', node, this.#power());
      } else return node;
    }
  }

  #startsFactor(token: Token | undefined): boolean {
    if (!token) return false;
    switch (token.type) {
      case 'number':
      case 'variable':
        return true;
      case 'words':
        return false;
      case 'command':
        return !/^(?:r?angle|rangle|end|cup|cap|in|to|le|ge|ne|pm|mp)$/.test(token.text);
      case 'sign':
        return (
          token.text === '(' || token.text === '{' || token.text === '[' || (token.text === '|' && this.#bars === 0)
        );
    }
  }

  #factor(): Expression {
    if (is(this.#peek(), '-')) {
      this.#at++;
      return binary('-', integer(0), this.#power());
    }
    if (is(this.#peek(), '+')) this.#at++;
    return this.#power();
  }

  #power(): Expression {
    let node = this.#primary();
    for (;;) {
      if (is(this.#peek(), '!')) {
        this.#at++;
        node = call('factorial', node);
      } else if (is(this.#peek(), '^')) {
        this.#at++;
        node = binary('^', node, this.#exponent());
      } else return node;
    }
  }

  #exponent(): Expression {
    if (is(this.#peek(), '-')) {
      this.#at++;
      return binary('-', integer(0), this.#primary());
    }
    return this.#primary();
  }

  #group(open: string): Expression {
    const bars = this.#bars;
    this.#bars = 0;
    const node = this.#sum();
    this.#expect(CLOSING[open]);
    this.#bars = bars;
    return node;
  }

  #primary(): Expression {
    const token = this.#next();
    switch (token.type) {
      case 'number':
        return this.#number(token.text);
      case 'variable':
        return this.#variable(token.text);
      case 'command':
        return this.#command(token.text);
      case 'words':
        throw new NotMathematics();
      case 'sign':
        if (token.text === '(' || token.text === '[' || token.text === '{') return this.#group(token.text);
        if (token.text === '|') {
          this.#bars++;
          const node = this.#sum();
          this.#expect('|');
          this.#bars--;
          return call('abs', node);
        }
        throw new NotMathematics();
    }
  }

  /** A number, or a mixed one: 1\frac{4}{5}, 3 1/2. */
  #number(text: string): Expression {
    const value = parseRational(text);
    if (!value) throw new NotMathematics();
    const node: Expression = { kind: 'number', value };
    if (!/^\d+$/.test(text)) return node;
    if (this.#peek()?.type === 'number' && is(this.#peek(1), '/') && this.#peek(2)?.type === 'number') {
      const numerator = this.#number(this.#next().text);
      this.#at++;
      return this.#mixed(node, binary('/', numerator, this.#number(this.#next().text)));
    }
    if (!isCommand(this.#peek(), 'frac')) return node;
    const before = [this.#at, this.#tokens.length];
    const saved = [...this.#tokens];
    this.#at++;
    const fraction = this.#fraction();
    const part = exact(fraction);
    if (part && part.n > 0n && part.n < part.d) return this.#mixed(node, fraction);
    // A product after all, as in 2\frac{x}{3}: read it again from there.
    this.#tokens.splice(0, this.#tokens.length, ...saved);
    this.#at = before[0];
    return node;
  }

  #mixed(whole: Expression, fraction: Expression): Expression {
    const part = exact(fraction);
    if (!part || part.n >= part.d) throw new NotMathematics();
    return binary('+', whole, fraction);
  }

  #variable(name: string): Expression {
    const index = this.#index();
    if (index === '') {
      if (name === 'i') return { kind: 'constant', name: 'i' };
      if (name === 'e') return { kind: 'constant', name: 'e' };
    }
    return { kind: 'variable', name: name + index };
  }

  /** x_1, x_{12}, x_n. */
  #index(): string {
    if (!is(this.#peek(), '_')) return '';
    this.#at++;
    const token = this.#next();
    if (token.type === 'number' || token.type === 'variable' || token.type === 'words') return `_${token.text}`;
    if (!is(token, '{')) throw new NotMathematics();
    let text = '_';
    while (!is(this.#peek(), '}')) text += this.#next().text;
    this.#at++;
    return text;
  }

  #fraction(): Expression {
    return binary('/', this.#argument(), this.#argument());
  }

  /** What a LaTeX command takes: a group, or one digit or letter. */
  #argument(): Expression {
    const token = this.#next();
    if (is(token, '{')) return this.#group('{');
    if (token.type === 'number' && /^\d+$/.test(token.text)) {
      if (token.text.length > 1) this.#tokens.splice(this.#at, 0, { type: 'number', text: token.text.slice(1) });
      return { kind: 'number', value: { n: BigInt(token.text[0]), d: 1n } };
    }
    if (token.type === 'variable') return this.#variable(token.text);
    if (token.type === 'command') return this.#command(token.text);
    throw new NotMathematics();
  }

  #command(name: string): Expression {
    switch (name) {
      case 'frac':
        return this.#fraction();
      case 'binom':
        return call('binomial', this.#argument(), this.#argument());
      case 'sqrt': {
        let degree: Expression = integer(2);
        if (is(this.#peek(), '[')) {
          this.#at++;
          degree = this.#group('[');
        }
        return call('root', degree, this.#primary());
      }
      case 'pi':
      case 'infty':
        return { kind: 'constant', name };
      case 'lfloor':
      case 'lceil': {
        const node = this.#sum();
        if (!isCommand(this.#next(), name.replace('l', 'r'))) throw new NotMathematics();
        return call(name === 'lfloor' ? 'floor' : 'ceil', node);
      }
      case 'log': {
        if (!is(this.#peek(), '_')) return call('log10', this.#operand());
        this.#at++;
        const base = this.#argument();
        return call('logBase', base, this.#operand());
      }
    }
    if (SIMPLE_FUNCTIONS.has(name)) {
      let power: Expression | undefined;
      if (is(this.#peek(), '^')) {
        this.#at++;
        power = this.#exponent();
      }
      const inverse = power && exact(power);
      if (inverse && inverse.n === -1n && inverse.d === 1n) {
        if (!Object.hasOwn(INVERSES, name)) throw new NotMathematics();
        return call(INVERSES[name], this.#operand());
      }
      const value = call(name as FunctionName, this.#operand());
      return power ? binary('^', value, power) : value;
    }
    if (
      /^(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|omega|Delta|Gamma|Lambda|Omega|Phi|Psi|Sigma|Theta|ell)$/.test(
        name,
      )
    )
      return { kind: 'variable', name: name + this.#index() };
    throw new NotMathematics();
  }

  /** What a function without brackets applies to: factors side by side, up to the next function. */
  #operand(): Expression {
    // sin(x)^2 is the square of the sine.
    if (is(this.#peek(), '(') || is(this.#peek(), '{') || is(this.#peek(), '[')) return this.#primary();
    if (is(this.#peek(), '-')) return this.#factor();
    let node = this.#power();
    for (;;) {
      const token = this.#peek();
      const another = token?.type === 'command' && (SIMPLE_FUNCTIONS.has(token.text) || token.text === 'log');
      if (!this.#startsFactor(token) || another || is(token, '(')) return node;
      node = binary('*', node, this.#power());
    }
  }
}
