// Written arithmetic, column by column from the right: the steps that addition and multiplication share.

/** The digits of a whole number, lowest first. */
export function digitsOf(value: number): number[] {
  return Array.from(String(value), Number).reverse();
}

/** The columns of a sum, lowest first, each `digit+digit+carry=total`. Missing digits are written as 0. */
export function additionColumns(a: number, b: number): string {
  const left = digitsOf(a);
  const right = digitsOf(b);
  const columns: string[] = [];
  let carry = 0;
  for (let i = 0; i < Math.max(left.length, right.length); i++) {
    const x = left[i] ?? 0;
    const y = right[i] ?? 0;
    const total = x + y + carry;
    columns.push(`${x}+${y}+${carry}=${total}`);
    carry = Math.floor(total / 10);
  }
  return columns.join(';');
}

/** The columns of a product with one digit, lowest first, each `digit*factor+carry=total`. */
export function multiplicationColumns(a: number, factor: number): string {
  const columns: string[] = [];
  let carry = 0;
  for (const x of digitsOf(a)) {
    const total = x * factor + carry;
    columns.push(`${x}*${factor}+${carry}=${total}`);
    carry = Math.floor(total / 10);
  }
  return columns.join(';');
}

/** The smallest and one past the largest whole number with so many digits. */
export function digitRange(digits: number): [lo: number, hi: number] {
  return [digits === 1 ? 0 : 10 ** (digits - 1), 10 ** digits];
}
