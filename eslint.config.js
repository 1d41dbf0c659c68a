// Lint rules: TypeScript's type-aware recommended set, no `any`, exhaustive switches, no floating promises.
import tseslint from 'typescript-eslint';

export default tseslint.config(
  {
    ignores: [
      'dist/',
      'node_modules/',
      'coverage/',
      'src/backends/cpu/wasm/assembly/',
      '**/*.generated.ts',
      '**/*.cjs',
      '**/*.mjs',
      'bin/',
      'eslint.config.js',
      '.carry/',
      'web/',
    ],
  },
  ...tseslint.configs.recommendedTypeChecked,
  {
    languageOptions: { parserOptions: { projectService: true, tsconfigRootDir: import.meta.dirname } },
    rules: {
      '@typescript-eslint/no-explicit-any': 'error',
      '@typescript-eslint/switch-exhaustiveness-check': ['error', { considerDefaultExhaustiveForUnions: true }],
      '@typescript-eslint/no-floating-promises': 'error',
      '@typescript-eslint/consistent-type-imports': 'error',
      '@typescript-eslint/no-unused-vars': ['error', { argsIgnorePattern: '^_', varsIgnorePattern: '^_' }],
      // Ops return a value or a promise (the CPU kernels are synchronous, GPU read-back is not): awaiting either is the contract.
      '@typescript-eslint/await-thenable': 'off',
      '@typescript-eslint/require-await': 'off',
      '@typescript-eslint/restrict-template-expressions': 'off',
      eqeqeq: 'error',
      'prefer-const': 'error',
    },
  },
);
