// gyre's version, written into results and fingerprints. Equal to package.json's (a test checks).
export const VERSION = '0.1.0';
