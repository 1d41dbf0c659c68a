// Where the code runs.

/** True in Node.js (and Bun and Deno's compatibility layer), false in a browser. */
export const inNode = typeof process !== 'undefined' && typeof process.versions?.node === 'string';
